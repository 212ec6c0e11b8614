// The page: the state of the service, and one job at a time from Generate to its pictures.

import { call, follow, Problem } from "./api.js";
import { fillModel, fillModels, markInvalid, nameOf, readRequest, reuse, unreadable } from "./form.js";
import { openRun } from "./gallery.js";
import { denoisingStrip } from "./noise.js";

const SERVICE_MS = 3000; // between looks at /readyz while no picture could be made
const READY_MS = 15000; // and while one could

const [form, service, problem, generate, cancel, progress, status, step] = [
  "request", "service", "problem", "generate", "cancel", "progress", "status", "step",
].map((id) => document.getElementById(id));

let models = [];
let model = null;
let job = null; // the one being made
let busy = false;
let canceling = false; // asked for, not yet told by the server

// The service

async function watchService() {
  for (;;) {
    const ready = await lookAtService();
    await new Promise((wake) => setTimeout(wake, ready ? READY_MS : SERVICE_MS));
  }
}

async function lookAtService() {
  try {
    await call("GET", "/readyz");
    if (!model) await loadModels();
    sayReady();
    return true;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 0) sayService("unreachable", "The server does not answer");
    else sayService("no-worker", "Waiting for a worker");
    return false;
  }
}

async function loadModels() {
  ({ models } = await call("GET", "/models"));
  if (models.length === 0) throw new Problem({ title: "No model is served", status: 503 });
  fillModels(models);
  choose(models[0]);
}

function choose(chosen) {
  model = chosen;
  fillModel(model);
  if (service.dataset.state === "ready") sayReady();
  setBusy(busy);
}

const sayReady = () => sayService("ready", `Ready: ${model.id}, ${model.image_size} × ${model.image_size}`);

function sayService(state, text) {
  service.dataset.state = state;
  if (service.textContent !== text) service.textContent = text; // an unchanged line is not read out again
}

// One job

async function make() {
  clearProblem();
  const errors = unreadable();
  if (errors.length) return showProblem(new Problem({ title: "Please look at these", errors }));
  const began_ms = performance.now();
  setBusy(true);
  sayStatus("sending", "Sending…");
  progress.value = 0;
  let run = null;
  try {
    job = await call("POST", "/generate", readRequest());
    cancel.disabled = false;
    run = openRun(job, models.find(({ id }) => id === job.request.model) ?? model, reuse);
    job = await follow(job, (now) => showJob((job = now), run));
    showEnd(job, (performance.now() - began_ms) / 1000);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    sayStatus("idle", "");
    showProblem(error);
  } finally {
    run?.close();
    job = null;
    canceling = false;
    setBusy(false);
  }
}

function showJob(job, run) {
  run.show(job);
  const { step: at = 0, steps = 0 } = job.progress ?? {};
  const count = job.request.num_images;
  progress.max = steps || 1;
  progress.value = at;
  step.textContent = job.status === "running" && steps ? `step ${at} of ${steps}` : "";
  cancel.disabled = canceling;
  if (canceling || job.status === "canceling") return sayStatus("canceling", "Canceling…");
  if (job.status === "queued") sayStatus("queued", inLine(job.queue_position));
  if (job.status === "running") sayStatus("running", count === 1 ? "Making 1 picture" : `Making ${count} pictures`);
}

const inLine = (ahead) => {
  if (ahead == null) return "Queued";
  return ahead === 0 ? "Queued, next in line" : `Queued, ${ahead} ${ahead === 1 ? "job" : "jobs"} ahead`;
};

function showEnd({ status: end, images, error }, seconds) {
  const made = images?.length ?? 0;
  const pictures = made === 1 ? "1 picture" : `${made} pictures`;
  progress.value = end === "succeeded" ? progress.max : 0;
  step.textContent = "";
  if (end === "succeeded") sayStatus(end, `${pictures} in ${seconds.toFixed(1)} s`);
  if (end === "canceled") sayStatus(end, made ? `Canceled after ${pictures}` : "Canceled");
  if (end === "failed") {
    sayStatus(end, "Failed");
    showProblem(new Problem({ title: "The job failed", detail: error?.detail ?? error?.title ?? error ?? "" }));
  }
}

async function stop() {
  generate.focus(); // a disabled button loses the focus
  canceling = cancel.disabled = true;
  sayStatus("canceling", "Canceling…");
  try {
    await call("DELETE", `/jobs/${job.id}`);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    canceling = cancel.disabled = false;
    if (error.status !== 409) showProblem(error); // 409: it ended by itself
  }
}

function setBusy(now) {
  busy = now;
  if (!busy && document.activeElement === cancel) generate.focus();
  generate.setAttribute("aria-disabled", String(busy || !model));
  if (!busy) cancel.disabled = true;
}

function sayStatus(state, text) {
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

// Problems

function showProblem({ title, detail, errors, retryAfter }) {
  const paragraph = (name, text) => Object.assign(document.createElement(name), { textContent: text });
  const lines = errors.map(({ field, detail: what }) => paragraph("li", `${nameOf(field)}: ${what}`));
  const list = document.createElement("ul");
  list.append(...lines);
  const wait = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  problem.replaceChildren(paragraph("strong", title));
  if (lines.length) problem.append(list);
  else if (detail || wait) problem.append(paragraph("p", `${detail}${wait}`.trim()));
  markInvalid(errors.map(({ field }) => field));
}

function clearProblem() {
  problem.replaceChildren();
  markInvalid([]);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (generate.getAttribute("aria-disabled") === "false") make();
});
cancel.addEventListener("click", stop);
document.getElementById("model").addEventListener("change", (event) => choose(models.find(({ id }) => id === event.target.value)));
document.getElementById("denoising").append(...denoisingStrip(6));
watchService();
