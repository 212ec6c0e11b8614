// One picture, large, with all that is known of it.

import { curlOf, fileName } from "./curl.js";
import { element, field, say } from "./dom.js";
import { describe, isSmall, urlOf } from "./frame.js";

const dialog = field("viewer");
const command = field("viewer-curl");
let current = null;

/** `again`: what puts the picture's settings into the form. */
export function installViewer(again) {
  field("viewer-close").addEventListener("click", () => dialog.close());
  field("viewer-copy").addEventListener("click", () => copyCommand(current));
  field("viewer-again").addEventListener("click", () => {
    dialog.close();
    again(current);
  });
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close()); // the ground beside it
}

export function openViewer(picture) {
  current = picture;
  const image = field("viewer-image");
  Object.assign(image, { src: urlOf(picture), alt: describe(picture), className: isSmall(picture.image_size) ? "pixels" : "" });
  field("viewer-title").textContent = picture.name;
  field("viewer-facts").replaceChildren(...facts(picture).flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]));
  Object.assign(field("viewer-download"), { href: urlOf(picture), download: fileName(picture) });
  command.value = curlOf(picture);
  say(field("viewer-said"), "");
  if (!dialog.open) dialog.showModal();
}

function facts({ seed, request, checkpoint }) {
  const [low, high] = request.guidance_interval;
  const always = low === 0 && high === 1;
  return [
    ["Seed", String(seed)],
    ["Guidance", always || request.guidance_scale === 1 ? String(request.guidance_scale) : `${request.guidance_scale}, for t/T in ${low} … ${high}`],
    ["Steps", String(request.steps)],
    ["Sampler", request.sampler],
    ["Model", request.model],
    ["Checkpoint", checkpoint.slice(0, 12)],
  ];
}

/** Copies the command of a picture; `button`, if any, says so. Where a page may not copy, the command is shown, marked. */
export async function copyCommand(picture, button) {
  try {
    await navigator.clipboard.writeText(curlOf(picture));
    if (!button) return say(field("viewer-said"), "Copied.");
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "curl"), 2000);
  } catch {
    openViewer(picture);
    command.closest("details").open = true;
    command.focus();
    command.select();
    say(field("viewer-said"), "This browser lets no page copy here: the command is marked, copy it by hand.");
  }
}
