// A small picture of each class, made once for a checkpoint, when asked for: one job of at most 64 classes at a time.

import { field, say } from "./dom.js";
import { call, Problem } from "./http.js";
import { setThumbnails } from "./picker.js";
import { submit, watch } from "./runs.js";
import { deleteRuns, loadSamples, saveSample } from "./store.js";

const AT_ONCE = 64; // what one job may have
const QUICK_STEPS = 10; // where the model has no draft
const SEED = 1;

const button = field("samples");
const state = field("samples-state");

let model = null;
let served = []; // checkpoints, whose samples stay
let urls = new Map(); // class index → blob URL
let making = null; // the run

/** Shows what was made before for the model's checkpoint. */
export async function showSamples(now, checkpoints) {
  served = checkpoints;
  if (model?.checkpoint === now.checkpoint) return;
  model = now;
  const kept = await loadSamples(now.checkpoint);
  if (model !== now) return; // another was chosen meanwhile
  for (const url of urls.values()) URL.revokeObjectURL(url);
  urls = new Map([...kept].map(([index, bytes]) => [index, urlOf(bytes)]));
  setThumbnails((index) => urls.get(index));
  offer();
}

const urlOf = (bytes) => URL.createObjectURL(new Blob([bytes], { type: "image/png" }));

const lacking = () => model.labels.map((_, index) => index).filter((index) => !urls.has(index));

function offer() {
  button.hidden = !model || (lacking().length === 0 && !making);
  button.textContent = making ? "Stop" : urls.size ? "More samples" : "Show samples";
}

async function make() {
  const classes = lacking().slice(0, AT_ONCE);
  const quick = model.quality.draft ? { quality: "draft" } : { steps: Math.min(model.defaults.steps, QUICK_STEPS) };
  say(state, `Asking for ${classes.length} quick pictures…`);
  button.disabled = true;
  try {
    const { run } = await submit("samples", [{ model: model.id, class_label: classes, seed: SEED, ...quick }], model);
    button.disabled = false;
    await resumeSamples(run);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    say(state, `${error.title}. ${error.detail}`);
  } finally {
    button.disabled = false;
  }
}

/** Follows a run of samples, also one of before a reload. */
export async function resumeSamples(run) {
  if (making) return;
  making = run;
  offer();
  const wanted = run.names.length;
  let made = 0;
  const save = ({ checkpoint, class_label, bytes }) => saveSample({ checkpoint, class_label, bytes }, served);
  const picture = ({ checkpoint, class_label: index, bytes }) => {
    made += 1;
    say(state, `Sample ${made} of ${wanted}`);
    if (checkpoint !== model?.checkpoint) return;
    urls.set(index, urlOf(bytes));
    setThumbnails((index) => urls.get(index));
  };
  try {
    const jobs = ([job]) => made || say(state, job.status === "queued" ? "Samples wait in the queue…" : "Making samples…");
    await watch(run, { jobs, preview() {}, picture }, new Set(), save);
    await deleteRuns([run.id]);
    say(state, made === wanted ? "" : `${made} of ${wanted} samples were made.`);
  } finally {
    making = null;
    offer();
  }
}

function stop() {
  for (const { id } of making.jobs) call("DELETE", `/jobs/${id}`).catch(() => {}); // it has ended, or the following tells
}

button.addEventListener("click", () => (making ? stop() : make()));
