// Class × guidance: the same classes with the same noise under several guidance values, as a table.

import { count, element, field } from "./dom.js";
import { waitingFrame } from "./frame.js";
import { Problem } from "./http.js";
import { nameOf } from "./runs.js";

const MAX_VALUES = 6;
const MAX_CLASSES = 10;
const MAX_GUIDANCE = 20;

/** Suggests values around the model's own guidance, and up to ten classes, all of them where there are no more. */
export function fillSheet(model) {
  const own = model.defaults.guidance_scale;
  const values = [1, (1 + own) / 2, own, 1.5 * own, 2 * own].map((value) => Math.min(Math.round(10 * value) / 10, MAX_GUIDANCE));
  field("sheet-guidance").value = [...new Set(values)].join(", ");
  const stride = Math.max(1, model.labels.length / MAX_CLASSES);
  const classes = Array.from({ length: Math.min(MAX_CLASSES, model.labels.length) }, (_, index) => Math.floor(index * stride));
  field("sheet-classes").value = classes.map((index) => nameOf(model, index)).join("; ");
}

/**
 * One request for each guidance value, each with all the classes. All have one seed, so that a row of the table differs in guidance alone;
 * and one interval, since the model's own goes with its own guidance only. Problem where a field cannot be read.
 */
export function sheetRequests(form, model) {
  const errors = [];
  const values = readList("sheet-guidance", /[;,\s]+/, MAX_VALUES, errors).map(Number);
  if (values.some((value) => !(value >= 1 && value <= MAX_GUIDANCE))) {
    errors.push({ field: "sheet-guidance", detail: `must be numbers from 1 to ${MAX_GUIDANCE}` });
  }
  const labels = readList("sheet-classes", /\s*;\s*/, MAX_CLASSES, errors).map((name) => indexOf(name, model, errors));
  if (errors.length) throw new Problem({ title: "The sheet needs a change", errors });
  const { num_images: _, class_label: __, ...rest } = form;
  const interval = (model.quality[form.quality] ?? model.defaults).guidance_interval ?? model.defaults.guidance_interval ?? [0, 1];
  const seed = form.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  return values.map((value) => ({ guidance_interval: interval, ...rest, class_label: labels, guidance_scale: value, seed }));
}

function readList(id, separator, most, errors) {
  const entries = field(id).value.trim().split(separator).filter(Boolean);
  if (entries.length < 1 || entries.length > most) errors.push({ field: id, detail: `must be 1 to ${most} of them; got ${entries.length}` });
  return entries;
}

function indexOf(given, model, errors) {
  const plain = (name) => name.trim().toLowerCase();
  const first = model.labels.findIndex(([name]) => plain(name) === plain(given));
  const found = first >= 0 ? first : model.labels.findIndex((names) => names.some((name) => plain(name) === plain(given)));
  if (found < 0) errors.push({ field: "sheet-classes", detail: `no class is called “${given}”` });
  return found;
}

/** The table of a run, a place for each picture: rows are classes, columns are jobs, each with its guidance. */
export function sheetTable(run) {
  const places = new Map();
  const { request } = run.jobs[0];
  const row = (name, index) => {
    const cells = run.jobs.map((job) => {
      const cell = element("td", { className: "pending" }, waitingFrame(job.request.seed + index, run.image_size));
      places.set(`${job.id}/${index}`, cell);
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
  };
  const heads = run.jobs.map((job) => element("th", { scope: "col" }, String(job.request.guidance_scale)));
  const what = `seed ${request.seed} · ${count(request.steps, "step")} · ${request.sampler}`;
  const table = element(
    "table",
    { className: "sheet" },
    element("caption", {}, element("strong", {}, "Class × guidance"), ` ${what}`),
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Guidance"), ...heads)),
    element("tbody", {}, ...run.names.map(row)),
  );
  const node = element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Class × guidance sheet" }, table);
  return { node, places };
}
