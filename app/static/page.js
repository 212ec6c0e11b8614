// The page: what is made, from a press of a button to the pictures, and again after a reload.

import { clearActivity, sayStatus, showActivity, showEnd } from "./activity.js";
import { element, field } from "./dom.js";
import { fillModel, fillModels, readRequest, reuse, showErrors, unreadable } from "./form.js";
import { clear, remove, showRun } from "./gallery.js";
import { isFinal } from "./follow.js";
import { call, Problem } from "./http.js";
import { installKey } from "./key.js";
import { denoisingStrip } from "./noise.js";
import { runOf, submit, watch } from "./runs.js";
import { resumeSamples, showSamples } from "./samples.js";
import { lookAgain, sayReady, watchService } from "./service.js";
import { fillSheet, sheetRequests } from "./sheet.js";
import { canKeep, deleteRuns, loadRuns, surplus } from "./store.js";
import { copyCommand, installViewer, openViewer } from "./viewer.js";

const ADOPTED = 3; // running jobs of the caller that the page did not begin itself, but shows
const [generate, sheet, cancel] = [field("generate"), field("sheet"), field("cancel")];

let models = [];
let model = null;
let sending = false;
let mustResume = true; // runs of before a reload, or of before a key was given
const active = []; // {run, canceling, made}: what is under way; the line under the buttons tells of the last
const act = { open: openViewer, again, copy: copyCommand };

// The service and its models

async function serviceReady(now) {
  models = now;
  fillModels(models);
  await choose(models.find(({ id }) => id === field("model").value) ?? models[0]);
  if (mustResume) await resume();
}

async function choose(chosen) {
  const isAnother = chosen.id !== model?.id || chosen.labels.length !== model.labels.length;
  model = chosen;
  sayReady(model);
  if (isAnother) {
    fillModel(model);
    fillSheet(model);
  }
  await showSamples(model, models.map(({ checkpoint }) => checkpoint));
  setBusy();
}

// From a request to its pictures

async function make(kind) {
  clearProblem();
  try {
    const errors = unreadable();
    if (errors.length) throw new Problem({ title: "This cannot be read", errors });
    const request = readRequest();
    const bodies = kind === "sheet" ? sheetRequests(request, model) : [request];
    sending = true;
    setBusy();
    sayStatus("sending", "Sending…");
    const { run, problem } = await submit(kind, bodies, models.find(({ id }) => id === request.model) ?? model);
    if (problem) showProblem(problem, kind);
    sending = false;
    lookAgain();
    await show(run);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (active.length === 0) clearActivity();
    showProblem(error, kind);
  } finally {
    sending = false;
    setBusy();
  }
}

/** Shows a run until it has ended. `kept`: its pictures that are here from before a reload. */
async function show(run, kept = []) {
  const view = showRun(run, kept, act);
  const entry = { run, canceling: false, made: kept.length };
  active.push(entry);
  setBusy();
  const hear = {
    jobs(jobs) {
      for (const { id, progress, request } of jobs) view.share(id, progress.step / request.steps);
      if (entry === active.at(-1)) showActivity(jobs, entry);
    },
    preview: (job, event) => view.preview(job.id, event),
    picture(picture) {
      entry.made += 1;
      view.picture(picture);
    },
  };
  try {
    const jobs = await watch(run, hear, new Set(kept.map(({ id }) => id)));
    view.close();
    run.ended = true;
    if (entry.made === 0) await deleteRuns([run.id]);
    if (entry === active.at(-1)) ended(jobs, entry);
    await makeRoom();
  } finally {
    active.splice(active.indexOf(entry), 1);
    setBusy();
    if (!mustResume) lookAgain(); // else a key is needed, or this is the first look
  }
}

function ended(jobs, { made }) {
  const wrong = showEnd(jobs, made);
  if (wrong) showProblem(new Problem(wrong));
}

async function makeRoom() {
  const old = surplus(await loadRuns());
  if (old.length === 0) return;
  remove(old);
  await deleteRuns(old);
}

async function stop() {
  const entry = active.at(-1);
  entry.canceling = true;
  setBusy();
  sayStatus("canceling", "Canceling…");
  try {
    for (const { id } of entry.run.jobs) await call("DELETE", `/jobs/${id}`).catch(unlessEnded);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    entry.canceling = false;
    setBusy();
    showProblem(error);
  }
}

function unlessEnded(error) {
  if (error.status !== 409) throw error;
}

function setBusy() {
  const busy = sending || active.length > 0;
  const isStopping = !active.length || active.at(-1).canceling;
  if (isStopping && document.activeElement === cancel) generate.focus(); // a disabled button loses the focus
  for (const button of [generate, sheet]) button.setAttribute("aria-disabled", String(busy || !model));
  cancel.disabled = isStopping;
}

function again(picture) {
  reuse(picture);
  clearProblem();
  generate.focus({ preventScroll: true });
  generate.scrollIntoView({ block: "center" });
  if (active.length === 0) sayStatus("idle", "The form holds this picture's settings.");
}

// What was there before a reload

async function showKept() {
  for (const { run, pictures } of await loadRuns()) {
    if (pictures.length) showRun(run, pictures, act).close();
  }
}

/** Goes on with what has not ended: runs of this browser, and a few jobs that the caller began elsewhere. */
async function resume() {
  mustResume = false;
  const kept = await loadRuns();
  const known = new Set([...kept.map(({ run }) => run), ...active.map(({ run }) => run)].flatMap(({ jobs }) => jobs.map(({ id }) => id)));
  for (const { run, pictures } of kept) {
    if (run.ended || active.some((entry) => entry.run.id === run.id)) continue;
    if (run.kind === "samples") quietly(resumeSamples(run));
    else quietly(show(run, pictures));
  }
  const { jobs } = await call("GET", "/jobs?limit=20");
  const others = jobs.filter((job) => !isFinal(job) && !known.has(job.id)).slice(0, ADOPTED);
  for (const job of others.reverse()) quietly(show(runOf("pictures", [job], models.find(({ id }) => id === job.request.model))));
}

const quietly = (promise) =>
  promise.catch((error) => {
    if (!(error instanceof Problem)) throw error; // a key is needed, which its own field tells
  });

// Problems

function showProblem({ title, detail, errors = [], retryAfter }, kind) {
  const renamed = kind === "sheet" ? errors.map(sheetError) : errors;
  const lines = showErrors(renamed).map((line) => element("li", {}, line));
  const text = `${lines.length ? "" : detail}${retryAfter ? ` Try again in ${retryAfter} s.` : ""}`.trim();
  field("problem").replaceChildren(
    element("strong", {}, title),
    ...(lines.length ? [element("ul", {}, ...lines)] : []),
    ...(text ? [element("p", {}, text)] : []),
  );
}

/** A sheet's guidance and classes come from fields of their own. */
function sheetError(error) {
  const own = { guidance_scale: "sheet-guidance", class_label: "sheet-classes" };
  return { ...error, field: own[error.field] ?? error.field };
}

function clearProblem() {
  field("problem").replaceChildren();
  showErrors([]);
}

const isFree = (button) => button.getAttribute("aria-disabled") === "false";

field("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isFree(generate)) make("pictures");
});
sheet.addEventListener("click", () => isFree(sheet) && make("sheet"));
cancel.addEventListener("click", stop);
field("model").addEventListener("change", ({ target }) => choose(models.find(({ id }) => id === target.value)));
field("clear").addEventListener("click", () => field("confirm").showModal());
field("confirm").addEventListener("close", async ({ target }) => {
  if (target.returnValue === "clear") await deleteRuns(clear(active.map(({ run }) => run.id)));
  target.returnValue = "";
});
field("denoising").append(...denoisingStrip(6));
installViewer(again);
installKey(() => {
  mustResume = true;
  lookAgain();
});
await showKept();
field("kept-hint").hidden = await canKeep();
watchService(serviceReady);
