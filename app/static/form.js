// The form: filled from the served model, read into the body of POST /generate.

import { element, field, say } from "./dom.js";
import { chooseClass, chosenClass, fillPicker } from "./picker.js";

const FIELDS = {
  class_label: field("class-label"),
  guidance_scale: field("guidance-scale"),
  quality: field("quality"),
  num_images: field("num-images"),
  seed: field("seed"),
  steps: field("steps"),
  sampler: field("sampler"),
  model: field("model"),
  "sheet-guidance": field("sheet-guidance"),
  "sheet-classes": field("sheet-classes"),
};
const NUMBERS = ["guidance_scale", "steps", "num_images", "seed"];
// What a picture was made with that the form does not show; it goes along until a setting is changed that it belongs to.
const CARRIED = ["guidance_interval", "guidance_channels", "guidance_rescale", "block_cache", "shift", "spacing", "eta"];
const SAID = { draft: "Draft", standard: "Standard", best: "Best" };
const GUIDANCE_HINT = field("guidance-hint").textContent;

let model = null;
let carried = null;
let ownGuidance = false; // the person's, which another quality does not change

const radios = () => [...FIELDS.quality.querySelectorAll("input")];
const quality = () => radios().find((radio) => radio.checked)?.value;
const option = (value, text) => new Option(text, value);

export function fillModels(models) {
  const before = FIELDS.model.value;
  FIELDS.model.replaceChildren(...models.map(({ id }) => option(id, id)));
  if (models.some(({ id }) => id === before)) FIELDS.model.value = before;
  field("model-field").hidden = models.length < 2;
}

/** Takes the model's labels, qualities, samplers, limits and defaults. */
export function fillModel(now) {
  model = now;
  ownGuidance = false;
  fillPicker(model.labels);
  fillQuality();
  FIELDS.sampler.replaceChildren(option("", "The model's choice"), ...model.samplers.map((name) => option(name, name)));
  FIELDS.sampler.disabled = false;
  FIELDS.steps.max = model.max_steps;
  FIELDS.steps.value = "";
  carry(null);
  chooseQuality("standard");
}

function fillQuality() {
  const names = Object.keys(SAID).filter((name) => name in model.quality);
  const choices = names.map((name) => {
    const radio = element("input", { type: "radio", name: "quality", value: name });
    radio.addEventListener("change", () => {
      FIELDS.steps.value = "";
      carry(null);
      settle();
    });
    return element("label", {}, radio, SAID[name]);
  });
  FIELDS.quality.querySelector(".choices").replaceChildren(...choices);
  FIELDS.quality.hidden = names.length === 0;
}

function chooseQuality(name) {
  for (const radio of radios()) radio.checked = radio.value === name;
  settle();
}

/** What follows from quality and steps: the number of steps that is told, and the guidance that was measured with it. */
function settle() {
  const settings = { ...model.defaults, ...model.quality[quality()] };
  FIELDS.steps.placeholder = String(settings.steps);
  say(field("quality-hint"), FIELDS.steps.value ? `Your own ${FIELDS.steps.value} steps, under More.` : `${settings.steps} steps for each picture.`);
  if (!ownGuidance) setGuidance(settings.guidance_scale);
}

/** Puts the settings of one picture back, so that Generate makes that picture again. */
export function reuse({ class_label: label, seed, request }) {
  chooseClass(label);
  ownGuidance = true;
  setGuidance(request.guidance_scale);
  const same = (settings) => settings.steps === request.steps && settings.sampler === request.sampler;
  const known = radios().find(({ value }) => same({ ...model.defaults, ...model.quality[value] }))?.value;
  FIELDS.steps.value = known ? "" : request.steps;
  FIELDS.sampler.value = request.sampler;
  FIELDS.num_images.value = 1;
  FIELDS.seed.value = seed;
  carry(Object.fromEntries(CARRIED.filter((name) => name in request).map((name) => [name, request[name]])));
  chooseQuality(known);
}

function carry(what) {
  carried = what;
  field("carried").hidden = !what;
}

/** The body of POST /generate; an empty field is left out, so that the server chooses. */
export function readRequest() {
  const request = { ...carried, model: FIELDS.model.value, class_label: chosenClass() };
  if (FIELDS.sampler.value) request.sampler = FIELDS.sampler.value;
  for (const name of NUMBERS) {
    if (FIELDS[name].value !== "") request[name] = FIELDS[name].valueAsNumber;
  }
  if (request.steps === undefined && quality()) request.quality = quality();
  return request;
}

/** Fields whose text is not a number at all: the browser gives no value for them. */
export const unreadable = () =>
  NUMBERS.filter((name) => FIELDS[name].validity.badInput).map((name) => ({ field: name, detail: "this is not a number" }));

const nameOf = (name) => field(`${FIELDS[name].id}-label`)?.textContent ?? FIELDS[name].labels[0].textContent;

/** Says each error at its field and puts the cursor into the first; with none, clears them. Returns them in words, for a list. */
export function showErrors(errors) {
  for (const [name, input] of Object.entries(FIELDS)) {
    const here = errors.filter((error) => error.field === name);
    const place = field(`${input.id}-error`);
    say(place, here.map(({ detail }) => sentence(detail)).join(" "));
    if (here.length) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
  const first = FIELDS[errors.find(({ field: name }) => name in FIELDS)?.field];
  first?.closest("details")?.setAttribute("open", "");
  first?.focus();
  return errors.map(({ field: name, detail }) => (name in FIELDS ? `${nameOf(name)}: ${detail}` : `${name}: ${detail}`));
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function setGuidance(value) {
  FIELDS.guidance_scale.value = field("guidance-range").value = value;
}

function changeGuidance(value, other) {
  ownGuidance = true;
  other.value = value;
  carry(null);
}

field("guidance-range").addEventListener("input", ({ target }) => changeGuidance(target.value, FIELDS.guidance_scale));
FIELDS.guidance_scale.addEventListener("input", ({ target }) => changeGuidance(target.value, field("guidance-range")));
FIELDS.class_label.addEventListener("change", () => {
  say(field("guidance-hint"), chosenClass() === null ? "Changes nothing here: there is no class to follow." : GUIDANCE_HINT);
});
FIELDS.steps.addEventListener("input", () => {
  carry(null);
  chooseQuality(FIELDS.steps.value === "" && !FIELDS.steps.validity.badInput ? "standard" : "");
});
FIELDS.sampler.addEventListener("change", () => carry(null));
field("dice").addEventListener("click", () => {
  FIELDS.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
});
