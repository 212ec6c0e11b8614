// What the browser keeps (IndexedDB): runs, their pictures, and sample pictures of classes. Where it keeps nothing, the page still works.

const NAME = "dit";
const VERSION = 1;
const PICTURES_MAX = 400; // the oldest runs go first

const answered = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function open() {
  const request = indexedDB.open(NAME, VERSION);
  request.onupgradeneeded = () => {
    const database = request.result;
    database.createObjectStore("runs", { keyPath: "id" });
    database.createObjectStore("pictures", { keyPath: "id" }).createIndex("run", "run");
    database.createObjectStore("samples", { keyPath: ["checkpoint", "class_label"] });
  };
  return answered(request);
}

let database = null;

/** A transaction over these stores; `act` gets them and returns a request or nothing. Undefined where nothing can be kept. */
async function within(names, mode, act) {
  database ??= open().catch((error) => console.info(`dit: nothing is kept in this browser: ${error}`));
  const opened = await database;
  if (!opened) return undefined;
  const transaction = opened.transaction(names, mode);
  const ended = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
  const request = act(...names.map((name) => transaction.objectStore(name)));
  await ended;
  return request?.result;
}

/** A full disk, say, must not stop a picture from being shown. */
async function write(names, act) {
  try {
    await within(names, "readwrite", act);
  } catch (error) {
    console.info(`dit: not kept in this browser: ${error}`);
  }
}

export const canKeep = async () => (await within(["runs"], "readonly", (runs) => runs.count())) !== undefined;

/** A run is {id, kind, began, ended, jobs [{id, request, checkpoint}], names, model, image_size}: what was asked for. */
export const saveRun = (run) => write(["runs"], (runs) => runs.put(run));

/** A picture is {id, run, job, index, seed, class_label, name, request, checkpoint, image_size, bytes}. */
export const savePicture = (picture) => write(["pictures"], (pictures) => pictures.put(picture));

/** All runs, oldest first, each with its pictures. */
export async function loadRuns() {
  const runs = (await within(["runs"], "readonly", (store) => store.getAll())) ?? [];
  const pictures = (await within(["pictures"], "readonly", (store) => store.getAll())) ?? [];
  const kept = new Map(runs.sort((one, other) => one.began - other.began).map((run) => [run.id, { run, pictures: [] }]));
  for (const picture of pictures) kept.get(picture.run)?.pictures.push(picture);
  return [...kept.values()];
}

export function deleteRuns(ids) {
  return write(["runs", "pictures"], (runs, pictures) => {
    for (const id of ids) {
      runs.delete(id);
      pictures.index("run").getAllKeys(id).onsuccess = ({ target }) => target.result.forEach((key) => pictures.delete(key));
    }
  });
}

/** The ids of the oldest runs that are too many, by their number of pictures. */
export function surplus(kept) {
  const old = [];
  let room = PICTURES_MAX;
  for (const { run, pictures } of [...kept].reverse()) {
    room -= pictures.length;
    if (room < 0 && run.ended) old.push(run.id);
  }
  return old;
}

/** Sample pictures of one checkpoint: class index → PNG bytes. */
export async function loadSamples(checkpoint) {
  const range = IDBKeyRange.bound([checkpoint], [checkpoint, []]);
  const found = (await within(["samples"], "readonly", (samples) => samples.getAll(range))) ?? [];
  return new Map(found.map(({ class_label: label, bytes }) => [label, bytes]));
}

/** Samples of checkpoints that are not served any more go, so that they do not heap up. */
export const saveSample = (sample, served) =>
  write(["samples"], (samples) => {
    samples.put(sample);
    samples.getAllKeys().onsuccess = ({ target }) => {
      for (const key of target.result) if (!served.includes(key[0])) samples.delete(key);
    };
  });
