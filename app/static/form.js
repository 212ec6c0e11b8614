// The form: filled from the served model, read into the body of POST /generate.

const field = (id) => document.getElementById(id);
const FIELDS = {
  class_label: field("class-label"),
  guidance_scale: field("guidance-scale"),
  steps: field("steps"),
  num_images: field("num-images"),
  seed: field("seed"),
  sampler: field("sampler"),
  model: field("model"),
};
const NUMBERS = ["guidance_scale", "steps", "num_images", "seed"];
const GUIDANCE_HINT = field("guidance-hint").textContent;

export const labelOf = (model, index) => (index === null ? "Unconditional" : (model?.labels?.[index]?.[0] ?? `Class ${index}`));

export const nameOf = (name) => FIELDS[name]?.labels?.[0]?.textContent ?? name;

const option = (value, text) => new Option(text, value);

export function fillModels(models) {
  FIELDS.model.replaceChildren(...models.map(({ id }) => option(id, id)));
  field("model-field").hidden = models.length < 2;
}

/** Takes the model's labels, samplers, limits and defaults. */
export function fillModel(model) {
  const classes = model.labels.map((_, index) => option(index, labelOf(model, index)));
  FIELDS.class_label.replaceChildren(...classes, document.createElement("hr"), option("", "Unconditional"));
  FIELDS.sampler.replaceChildren(...model.samplers.map((name) => option(name, name)));
  FIELDS.class_label.disabled = FIELDS.sampler.disabled = false;
  FIELDS.sampler.value = model.defaults.sampler;
  FIELDS.steps.max = model.max_steps;
  FIELDS.steps.value = model.defaults.steps;
  setGuidance(model.defaults.guidance_scale);
  hintGuidance();
}

/** Puts the settings of one picture of a job back, so that Generate makes that picture again. */
export function reuse({ classLabel, seed, request }) {
  FIELDS.class_label.value = classLabel ?? "";
  FIELDS.steps.value = request.steps;
  FIELDS.sampler.value = request.sampler;
  FIELDS.num_images.value = 1;
  FIELDS.seed.value = seed;
  setGuidance(request.guidance_scale);
  hintGuidance();
  FIELDS.seed.focus();
}

/** The body of POST /generate; an empty number is left out, so that the server chooses. */
export function readRequest() {
  const label = FIELDS.class_label.value;
  const request = { model: FIELDS.model.value, sampler: FIELDS.sampler.value, class_label: label === "" ? null : Number(label) };
  for (const name of NUMBERS) {
    if (FIELDS[name].value !== "") request[name] = FIELDS[name].valueAsNumber;
  }
  return request;
}

/** Fields whose text is not a number at all: the browser gives no value for them. */
export const unreadable = () =>
  NUMBERS.filter((name) => FIELDS[name].validity.badInput).map((name) => ({ field: name, detail: "this is not a number" }));

/** Marks the fields that a problem names and puts the cursor into the first; with none, clears the marks. */
export function markInvalid(names) {
  for (const [name, input] of Object.entries(FIELDS)) {
    if (names.includes(name)) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
  const first = names.find((name) => name in FIELDS);
  if (!first) return;
  FIELDS[first].closest("details")?.setAttribute("open", "");
  FIELDS[first].focus();
}

function setGuidance(value) {
  FIELDS.guidance_scale.value = field("guidance-range").value = value;
}

function hintGuidance() {
  const none = FIELDS.class_label.value === "";
  field("guidance-hint").textContent = none ? "Changes nothing here: there is no class to follow." : GUIDANCE_HINT;
}

field("guidance-range").addEventListener("input", (event) => {
  FIELDS.guidance_scale.value = event.target.value;
});
FIELDS.guidance_scale.addEventListener("input", (event) => {
  field("guidance-range").value = event.target.value;
});
FIELDS.class_label.addEventListener("change", hintGuidance);
field("dice").addEventListener("click", () => {
  FIELDS.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
});
