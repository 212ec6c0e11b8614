// The line under the buttons: what becomes of a run, in words, and a bar.

import { count, field, say } from "./dom.js";
import { countOf } from "./runs.js";

const [bar, status, step] = [field("progress"), field("status"), field("step")];

export function sayStatus(state, text) {
  status.dataset.state = state;
  say(status, text);
}

export function clearActivity() {
  sayStatus("idle", "");
  bar.value = 0;
  say(step, "");
}

const picturesOf = (jobs) => jobs.reduce((sum, { request }) => sum + countOf(request), 0);

const share = (jobs) => jobs.reduce((sum, { progress, request }) => sum + progress.step / request.steps, 0) / jobs.length;

/** `made`: pictures that are here. */
export function showActivity(jobs, { canceling, made }) {
  bar.max = 1;
  bar.value = share(jobs);
  const running = jobs.find(({ status }) => status === "running" || status === "canceling");
  const queued = jobs.find(({ status }) => status === "queued");
  const job = running ?? queued;
  if (!job) return; // the end is told by itself
  if (running) say(step, jobs.length > 1 ? `${made} of ${picturesOf(jobs)}` : `step ${job.progress.step} of ${job.request.steps}`);
  else say(step, "");
  if (job.unreachable) sayStatus("trouble", `${job.unreachable} does not answer. The job goes on by itself once it does.`);
  else if (canceling || job.status === "canceling") sayStatus("canceling", "Canceling…");
  else if (job.status === "queued") sayStatus("queued", inLine(job));
  else if (job.silent_s) sayStatus("trouble", "No news from the worker. If it has ended, another one takes over.");
  else sayStatus("running", `Making ${count(picturesOf(jobs), "picture")}${job.restarted ? ", from the start: the worker before has ended" : ""}`);
}

function inLine({ restarted, queue_position: ahead, estimated_wait_s: wait_s }) {
  if (restarted) return "Its worker ended. Another one takes over.";
  if (ahead == null) return "Queued";
  const wait = wait_s ? `, about ${spoken(wait_s)}` : "";
  return ahead === 0 ? `Queued, next in line${wait}` : `Queued, ${count(ahead, "job")} ahead${wait}`;
}

const spoken = (seconds) => (seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`);

/** By the server's clock, so that it is right after a reload too. */
function secondsOf(jobs) {
  const times = (name, pick) => pick(...jobs.map((job) => Date.parse(job[name])));
  return (times("finished_at", Math.max) - times("created_at", Math.min)) / 1000;
}

/** Returns why, if something went wrong. */
export function showEnd(jobs, made) {
  const bad = jobs.find(({ status }) => status === "failed" || status === "gone");
  const canceled = jobs.some(({ status }) => status === "canceled");
  const pictures = count(made, "picture");
  const seconds = secondsOf(jobs);
  say(step, "");
  bar.value = bad || canceled ? 0 : 1;
  if (bad) sayStatus("failed", bad.status === "gone" ? "Gone" : "Failed");
  else if (canceled) sayStatus("canceled", made ? `Canceled after ${pictures}` : "Canceled");
  else sayStatus("succeeded", `${pictures} in ${seconds < 90 ? `${seconds.toFixed(1)} s` : spoken(seconds)}`);
  return bad && { title: bad.status === "gone" ? "The pictures are gone" : "The job failed", detail: bad.error ?? "" };
}
