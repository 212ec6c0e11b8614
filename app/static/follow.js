// One job, followed to its end.

import { events } from "./events.js";
import { call, Problem } from "./http.js";

const POLL_MS = 1000;
const SILENT_MS = 3000; // without an event, after which a running job is asked for
const FINAL = new Set(["succeeded", "failed", "canceled"]);

export const isFinal = (job) => FINAL.has(job.status);

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

/**
 * Calls `hear.job(job)` at every change, `hear.preview(event)` and `hear.image(event)` as they come; returns the finished job.
 * The event stream tells of steps and pictures. What it can't tell (the place in the queue, anything at all once it has broken) is asked
 * for every second. Besides its own fields a job heard of has `silent_s`, how long nothing was news; `restarted`, that another worker
 * had begun it; `unreachable`, who does not answer, the server or the queue behind it. Throws Problem when the job is gone.
 */
export async function follow(job, hear) {
  const path = `/jobs/${job.id}`;
  const stop = new AbortController();
  let news_ms = performance.now();
  let over = false; // no more events will come
  const change = (fields) => hear.job((job = { ...job, ...fields }));
  const changeTold = (fields) => {
    news_ms = performance.now();
    change({ silent_s: 0, unreachable: null, ...fields });
  };

  async function listen() {
    try {
      for await (const { name, data } of events(`${path}/events`, stop.signal)) {
        if (name === "queued") changeTold({ status: "queued", restarted: job.status === "running" || job.restarted });
        if (name === "progress") changeTold({ status: job.status === "canceling" ? "canceling" : "running", progress: data });
        if (name === "preview") hear.preview(data);
        if (name === "image") hear.image(data);
      }
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // else the look at the job below meets it too
    } finally {
      over = true;
    }
  }

  async function look() {
    try {
      const read = await call("GET", path);
      const isNews = read.status !== job.status || read.progress.step !== job.progress.step;
      (isNews ? changeTold : change)({ ...read, unreachable: null });
    } catch (error) {
      if (!(error instanceof Problem) || error.isFinal) throw error;
      change({ unreachable: error.isOfQueue ? "The queue" : "The server" });
    }
  }

  const listening = listen();
  try {
    hear.job(job);
    while (!isFinal(job)) {
      await (over ? sleep(POLL_MS) : Promise.race([listening, sleep(POLL_MS)]));
      const silent_ms = performance.now() - news_ms;
      if (silent_ms > SILENT_MS) job = { ...job, silent_s: Math.round(silent_ms / 1000) };
      if (over || job.status !== "running" || silent_ms > SILENT_MS) await look();
    }
    return job;
  } finally {
    stop.abort();
  }
}
