// The pictures, the newest run first. A tile is noise until its picture comes; what has come stays after a reload.

import { fileName } from "./curl.js";
import { count, element, field, say } from "./dom.js";
import { fade, forget, isSmall, pictureFrame, showPreview, urlOf, waitingFrame } from "./frame.js";
import { countOf } from "./runs.js";
import { sheetTable } from "./sheet.js";

const gallery = field("gallery");
const shown = new Map(); // run's id → {run, pictures, node}

/** Puts a run on top; returns what shows it there. `act` has open, again and copy, each for a picture. */
export function showRun(run, pictures, act) {
  const { node, places } = run.kind === "sheet" ? sheetTable(run) : tiles(run);
  const entry = { run, pictures: [], node };
  gallery.classList.toggle("large", !isSmall(run.image_size));
  shown.get(run.id)?.node.remove();
  shown.set(run.id, entry);
  gallery.prepend(node);

  const view = {
    share(jobId, share) {
      for (const [id, place] of places) if (id.startsWith(jobId)) fade(place, share);
    },
    preview(jobId, { index, image }) {
      const place = places.get(`${jobId}/${index}`);
      if (place?.classList.contains("pending")) showPreview(place.querySelector(".frame"), image, run.image_size);
    },
    picture(picture) {
      const place = places.get(picture.id);
      if (!place?.classList.contains("pending")) return;
      place.querySelector(".frame").replaceWith(pictureFrame(picture, act.open));
      place.querySelector(".links")?.append(...actions(picture, act));
      place.classList.replace("pending", "picture");
      entry.pictures.push(picture);
      tell();
    },
    /** Takes away the places whose pictures will not come. */
    close() {
      for (const place of places.values()) if (place.matches("figure.pending")) place.remove();
      for (const frame of node.querySelectorAll("td.pending .frame")) frame.replaceChildren();
      if (entry.pictures.length === 0) remove([run.id]);
    },
  };
  for (const picture of pictures) view.picture(picture);
  tell();
  return view;
}

/** The ids of runs that are not of `running`; all of them leave the page. */
export function clear(running) {
  const ids = [...shown.keys()].filter((id) => !running.includes(id));
  remove(ids);
  return ids;
}

export function remove(ids) {
  for (const id of ids) {
    const { pictures, node } = shown.get(id) ?? { pictures: [] };
    node?.remove();
    pictures.forEach((picture) => forget(picture.id));
    shown.delete(id);
  }
  tell();
}

function tell() {
  const number = [...shown.values()].reduce((sum, { pictures }) => sum + pictures.length, 0);
  field("empty").hidden = shown.size > 0;
  field("pictures-bar").hidden = shown.size === 0;
  field("clear").disabled = number === 0;
  say(field("kept"), count(number, "picture"));
}

/** Places that stand in the gallery's own grid, so that runs of one picture do not each take a line. */
function tiles(run) {
  const places = new Map();
  for (const job of run.jobs) {
    for (let index = 0; index < countOf(job.request); index += 1) places.set(`${job.id}/${index}`, tile(run, job, index));
  }
  return { node: element("div", { className: "run" }, ...places.values()), places };
}

/** Noise over the caption that the picture will have, so that nothing moves when it comes. */
function tile(run, { id, request }, index) {
  const name = run.names[index];
  const seed = request.seed + index;
  const figure = element(
    "figure",
    { className: "pending" },
    waitingFrame(seed, run.image_size),
    element(
      "figcaption",
      {},
      element("strong", { title: name }, name),
      element("span", { className: "seed" }, `seed ${seed}`),
      element("span", {}, `guidance ${request.guidance_scale} · ${count(request.steps, "step")}`),
      element("span", { className: "links" }),
    ),
  );
  Object.assign(figure.dataset, { job: id, index, seed });
  return figure;
}

function actions(picture, act) {
  const button = (text, title, does) => {
    const node = element("button", { type: "button", title, ariaLabel: `${title}: ${picture.name}, seed ${picture.seed}` }, text);
    node.addEventListener("click", () => does(picture, node));
    return node;
  };
  const link = element("a", { href: urlOf(picture), download: fileName(picture), ariaLabel: `Download: ${fileName(picture)}` }, "Download");
  return [button("Again", "Again with this seed", act.again), link, button("curl", "Copy as curl", act.copy)];
}
