// Server-sent events over fetch, which can carry a key where EventSource cannot.

import { Problem, request } from "./http.js";

const PATIENCE_MS = 20_000; // the server says at least every two seconds that it is still there
const [FIRST_PAUSE_MS, LONGEST_PAUSE_MS] = [500, 8_000];

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

/**
 * The events of a job, each once: {name, data}. A connection that breaks is made again, after the last event that came.
 * Ends after `done`, or when `signal` says so. Throws Problem when the job is gone.
 */
export async function* events(path, signal) {
  let last = null;
  let pause_ms = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      const { body } = await request("GET", path, { accept: "text/event-stream", headers, signal });
      for await (const { id, ...event } of parse(body)) {
        last = id || last;
        pause_ms = FIRST_PAUSE_MS;
        yield event;
        if (event.name === "done") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.isFinal) throw error;
    }
    await sleep(pause_ms);
    pause_ms = Math.min(2 * pause_ms, LONGEST_PAUSE_MS);
  }
}

async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await within(PATIENCE_MS, reader.read());
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      yield* blocks.map(read).filter(Boolean);
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have broken already
  }
}

/** One block of lines; null for a comment, which only says that the server is there. */
function read(block) {
  const fields = Object.fromEntries(
    block.split("\n").map((line) => {
      const colon = line.indexOf(":");
      return [line.slice(0, colon), line.slice(colon + 1).trimStart()];
    }),
  );
  return fields.data === undefined ? null : { id: fields.id, name: fields.event, data: JSON.parse(fields.data) };
}

function within(ms, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("silent")), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
