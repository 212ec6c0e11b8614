// The state of the service: whether a picture could be made now, by which models, and how much is under way.

import { count, field, say } from "./dom.js";
import { call, Problem } from "./http.js";

const ABSENT_MS = 3_000; // between looks while no picture could be made
const READY_MS = 15_000; // and while one could
const RECENT = 50; // jobs that are counted

const line = field("service");

let wake = () => {};

/** Looks now, besides every few seconds. */
export const lookAgain = () => wake();

/** Calls `ready(models)` at every look that finds some. While a key is needed, it waits for lookAgain(). */
export async function watchService(ready) {
  for (;;) {
    const state = await look(ready);
    const pause_ms = { ready: READY_MS, key: 2 ** 31 - 1 }[state] ?? ABSENT_MS;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, pause_ms);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

async function look(ready) {
  try {
    await call("GET", "/readyz");
    const { models } = await call("GET", "/models");
    if (models.length === 0) throw new Problem({ title: "No model is served", status: 503 });
    await ready(models);
    await countJobs();
    return "ready";
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    say(field("queue"), "");
    if (error.status === 401) return tell("key", "A key is needed");
    if (error.status === 403) return tell("key", "This key may not make pictures");
    if (error.isOfQueue) return tell("no-queue", sentence(error.detail));
    return error.status === 0 ? tell("unreachable", "The server does not answer") : tell("no-worker", "Waiting for a worker");
  }
}

/** "the queue (Redis) does not answer; try again shortly" → what is the matter. */
const sentence = (detail) => detail.charAt(0).toUpperCase() + detail.slice(1).split(";")[0];

async function countJobs() {
  const { jobs } = await call("GET", `/jobs?limit=${RECENT}`);
  const waiting = jobs.filter(({ status }) => status === "queued").length;
  const running = jobs.filter(({ status }) => status === "running" || status === "canceling").length;
  const parts = [running && `${count(running, "job")} running`, waiting && `${waiting} waiting`].filter(Boolean);
  say(field("queue"), parts.join(", "));
}

export const sayReady = ({ id, image_size: size, device }) => tell("ready", `Ready: ${id}, ${size} × ${size}${device ? ` on ${device}` : ""}`);

function tell(state, text) {
  line.dataset.state = state;
  say(line, text);
  return state;
}
