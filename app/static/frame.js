// One picture's place: noise, then what it looks like on its way, then the picture, which opens when it is pressed.

import { element } from "./dom.js";
import { noiseTile } from "./noise.js";

const PIXELS_MAX = 128; // up to this size a picture is enlarged without blur

const urls = new Map(); // picture's id → blob URL

export const isSmall = (imageSize) => imageSize <= PIXELS_MAX;

export const describe = ({ name, seed }) => `${name}, seed ${seed}`;

export function urlOf({ id, bytes }) {
  if (!urls.has(id)) urls.set(id, URL.createObjectURL(new Blob([bytes], { type: "image/png" })));
  return urls.get(id);
}

/** Gives the memory of a picture back that is shown no more. */
export function forget(id) {
  URL.revokeObjectURL(urls.get(id));
  urls.delete(id);
}

export function waitingFrame(seed, imageSize) {
  return element("div", { className: "frame", ariaHidden: "true" }, noiseTile(seed, imageSize));
}

/** Without previews, noise fades a little with the share of steps that are done. */
export function fade(frame, share) {
  const canvas = frame.querySelector("canvas");
  if (canvas) canvas.style.opacity = 1 - 0.75 * share;
}

export function showPreview(frame, dataUrl, imageSize) {
  const image = frame.querySelector("img") ?? element("img", { alt: "", className: isSmall(imageSize) ? "preview pixels" : "preview" });
  image.src = dataUrl;
  if (!image.isConnected) frame.replaceChildren(image);
}

export function pictureFrame(picture, open) {
  const image = element("img", { src: urlOf(picture), alt: describe(picture), className: isSmall(picture.image_size) ? "pixels" : "" });
  const button = element("button", { type: "button", className: "frame", title: "Look closer" }, image);
  button.addEventListener("click", () => open(picture));
  return button;
}
