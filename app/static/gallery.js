// The pictures, newest job first. A tile is noise until its picture comes.

import { labelOf } from "./form.js";
import { noiseTile } from "./noise.js";

const PIXELS_MAX = 128; // up to this natural size a picture is enlarged without blur

const gallery = document.getElementById("gallery");

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

/** Opens the tiles of a new job; returns what shows the job in them. */
export function openRun(job, model, onReuse) {
  const { seed, num_images: count } = job.request;
  const tiles = Array.from({ length: count }, (_, index) => pendingTile(job, index, model));
  const run = element("div", { className: "run" }, ...tiles);
  gallery.classList.toggle("large", model.image_size > PIXELS_MAX);
  gallery.prepend(run);
  document.getElementById("empty").hidden = true;

  return {
    show(job) {
      const { step = 0, steps = 0 } = job.progress ?? {};
      for (const canvas of run.querySelectorAll("canvas")) canvas.style.opacity = 1 - 0.75 * (steps ? step / steps : 0);
      for (const image of job.images ?? []) {
        const index = image.index ?? image.seed - seed;
        if (tiles[index]?.className === "pending") placePicture(tiles[index], { ...image, index }, job, model, onReuse);
      }
    },
    /** Takes away the tiles whose pictures will not come. */
    close() {
      for (const tile of run.querySelectorAll(".pending")) tile.remove();
    },
  };
}

const classOf = ({ class_label: label }, index) => (Array.isArray(label) ? label[index] : label);

/** Noise over the caption the picture will have, so that nothing moves when it comes. */
function pendingTile({ request }, index, model) {
  const seed = request.seed + index;
  const label = labelOf(model, classOf(request, index));
  const caption = element(
    "figcaption",
    {},
    element("strong", { title: label }, label),
    element("span", { className: "seed" }, `seed ${seed}`),
    element("span", {}, `guidance ${request.guidance_scale} · ${request.steps} steps`),
    element("span", { className: "links" }),
  );
  return element("figure", { className: "pending", ariaHidden: "true" }, noiseTile(seed, model.image_size), caption);
}

function placePicture(figure, { index, url, seed }, { id, request }, model, onReuse) {
  const classLabel = classOf(request, index);
  const label = labelOf(model, classLabel);
  const image = element("img", { src: url, alt: `${label}, seed ${seed}` });
  image.addEventListener("load", () => {
    image.classList.toggle("pixels", image.naturalWidth <= PIXELS_MAX);
    figure.querySelector("canvas").replaceWith(image);
  });
  const file = `${label.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-")}-${seed}.png`;
  const again = element("button", { type: "button", title: "Put these settings into the form" }, "Use settings");
  again.addEventListener("click", () => onReuse({ classLabel, seed, request }));
  figure.querySelector(".links").append(element("a", { href: url, download: file }, "Download"), again);
  figure.className = "picture";
  figure.ariaHidden = null;
  Object.assign(figure.dataset, { job: id, index, seed });
}
