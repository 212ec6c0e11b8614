// A run: one or several jobs that belong together, from the request to the last picture.

import { follow } from "./follow.js";
import { call, pictureBytes, Problem } from "./http.js";
import { savePicture, saveRun } from "./store.js";

const [TRIES, PAUSE_MS] = [5, 1000]; // for a picture of a job that has ended
const LANES = 2; // jobs of a run followed at once: a browser opens six connections to a server, and pictures need some of them

export const classOf = ({ class_label: label }, index) => (Array.isArray(label) ? label[index] : label);

export const countOf = ({ class_label: label, num_images: images }) => images ?? label.length;

/** The name of a class, and of none. */
export const nameOf = (model, index) => (index === null ? "No class" : (model?.labels[index]?.[0] ?? `Class ${index}`));

/** The run of jobs that the server has taken. */
export function runOf(kind, jobs, model) {
  const { request } = jobs[0];
  const names = Array.from({ length: countOf(request) }, (_, index) => nameOf(model, classOf(request, index)));
  const asked = jobs.map(({ id, request, checkpoint }) => ({ id, request, checkpoint }));
  return { id: jobs[0].id, kind, began: Date.now(), ended: false, jobs: asked, names, model: request.model, image_size: model?.image_size ?? 32 };
}

/**
 * Sends the requests of a run one after another. Where one after the first is refused, the run is what was taken, and `problem` says why
 * it is not more; Problem where nothing was taken.
 */
export async function submit(kind, bodies, model) {
  const jobs = [];
  let problem = null;
  for (const body of bodies) {
    try {
      jobs.push(await call("POST", `/generate${kind === "samples" ? "" : "?previews=true"}`, body));
    } catch (error) {
      if (!(error instanceof Problem) || jobs.length === 0) throw error;
      problem = error;
      break;
    }
  }
  const run = runOf(kind, jobs, model);
  await saveRun(run);
  return { run, problem };
}

/**
 * Follows the jobs of a run to their ends. `hear.jobs(jobs)` gets them all at every change, `hear.preview(job, event)` and
 * `hear.picture(picture)` what there is to see; `have` are ids of pictures that are here already. Returns the finished jobs; one whose
 * results have expired has the status `gone`. Throws Problem where a key is needed: the run has not ended then.
 */
export async function watch(run, hear, have = new Set(), save = savePicture) {
  const states = new Map(run.jobs.map((job) => [job.id, { ...job, status: "queued", progress: { step: 0 }, images: [] }]));
  const told = (job) => {
    states.set(job.id, job);
    hear.jobs([...states.values()]);
  };
  const waiting = [...run.jobs];
  const lane = async () => {
    for (let job = waiting.shift(); job; job = waiting.shift()) await watchJob(run, states.get(job.id), told, hear, have, save);
  };
  await Promise.all(Array.from({ length: LANES }, lane));
  await saveRun({ ...run, ended: true });
  return [...states.values()];
}

async function watchJob(run, job, told, hear, have, save) {
  const fetching = new Map(); // picture's id → its promise

  async function keep({ index, seed, url }) {
    const picture = {
      id: `${job.id}/${index}`, run: run.id, job: job.id, index, seed, class_label: classOf(job.request, index),
      name: run.names[index], request: job.request, checkpoint: job.checkpoint, image_size: run.image_size,
      bytes: await pictureBytes(url),
    };
    have.add(picture.id);
    await save(picture);
    hear.picture(picture);
  }

  const image = (event) => {
    const id = `${job.id}/${event.index}`;
    if (have.has(id) || fetching.has(id)) return;
    // The picture of a worker that has died since is not there any more; it comes again, and is asked for at the end.
    fetching.set(id, keep(event).catch((error) => error instanceof Problem || Promise.reject(error)).finally(() => fetching.delete(id)));
  };

  try {
    const end = await follow(job, { job: told, preview: (event) => hear.preview(job, event), image });
    await Promise.all(fetching.values());
    for (const { url, seed } of end.images) {
      const index = Number(url.split("/").at(-1));
      if (!have.has(`${job.id}/${index}`)) await persist(() => keep({ index, seed, url }));
    }
  } catch (error) {
    if (!(error instanceof Problem) || error.status === 401) throw error;
    told({ ...job, status: "gone", error: error.detail || error.title });
  }
}

/** A server that is away for a moment costs no picture. */
async function persist(act) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await act();
    } catch (error) {
      if (!(error instanceof Problem) || error.isFinal || tries === TRIES) throw error;
      await new Promise((wake) => setTimeout(wake, tries * PAUSE_MS));
    }
  }
}
