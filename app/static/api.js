// The page's HTTP calls: JSON in, JSON out, and one kind of error (RFC 9457).

const POLL_MS = 1000;
const GONE = new Set([401, 403, 404, 410]); // asking again would not help
const FINAL = new Set(["succeeded", "failed", "canceled"]);

export const isFinal = (job) => FINAL.has(job.status);

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

export class Problem extends Error {
  constructor({ title, detail = "", status = 0, errors = [], retryAfter = null }) {
    super(title);
    Object.assign(this, { title, detail, status, errors, retryAfter });
  }
}

export async function call(method, path, body) {
  const options = { method, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Problem({ title: "The server does not answer", detail: "Is it running?" });
  }
  const data = await response.json().catch(() => ({}));
  if (response.ok) return data;
  const { status, headers } = response;
  throw new Problem({ title: `The server answered ${status}`, ...data, status, retryAfter: headers.get("Retry-After") });
}

/**
 * Follows a job to its end, calling `show(job)` at every change; returns the finished job.
 * The event stream tells of steps and pictures. What it can't tell (the place in the queue, anything at all
 * once the stream has broken) is asked for every second. Throws Problem when the job is gone.
 */
export async function follow(job, show) {
  const path = `/jobs/${job.id}`;
  const change = (fields) => show((job = { ...job, ...fields }));
  const stream = listen(`${path}/events`, () => job, change);
  show(job);
  try {
    while (!isFinal(job)) {
      await Promise.race([stream.done, sleep(POLL_MS)]);
      if (stream.open && job.status === "running") continue;
      const read = await call("GET", path).catch((problem) => {
        if (GONE.has(problem.status)) throw problem;
        return null; // away for a moment
      });
      change({ ...read, ...stream.ending });
    }
    return job;
  } finally {
    stream.close();
  }
}

function listen(url, current, change) {
  const source = new EventSource(url);
  const stream = { open: true, ending: null, done: null, close };
  function close() {
    stream.open = false;
    source.close();
  }
  const on = (name, act) => source.addEventListener(name, (event) => act(JSON.parse(event.data)));

  on("queued", () => change({ status: "queued" }));
  on("progress", (progress) => change({ status: "running", progress }));
  on("image", (image) => change({ images: [...(current().images ?? []), image] }));
  stream.done = new Promise((resolve) => {
    on("done", (ending) => {
      stream.ending = ending;
      close();
      resolve();
    });
  });
  source.onerror = close;
  return stream;
}
