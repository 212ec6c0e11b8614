// The class picker: a text field that filters a list (ARIA's combobox with a listbox).

import { count, element, field, say } from "./dom.js";

const PAGE = 8; // options that Page Up and Page Down pass

const input = field("class-label");
const list = field("class-list");
const thumb = field("class-thumb");

let entries = []; // {index, name, names, keys}; index null is no class
let chosen = null; // the entry
let active = -1; // the option under the keyboard, of those shown
let thumbnailOf = () => null; // class index → URL

const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().split(/\s+/).filter(Boolean).join(" ");

const isOpen = () => !list.hidden;

/** `labels`: per class all its names. The choice stays, if there still is such a class. */
export function fillPicker(labels) {
  const classes = labels.map((names, index) => ({ index, name: names[0], names, keys: names.map(plain) }));
  entries = [...classes, { index: null, name: "No class", names: ["No class", "unconditional"], keys: ["no class", "unconditional"] }];
  input.disabled = false;
  pick(entries.find(({ index }) => chosen && index === chosen.index) ?? entries[0]);
}

export const chosenClass = () => chosen?.index ?? null;

export const chooseClass = (index) => pick(entries.find((entry) => entry.index === index) ?? chosen);

export function setThumbnails(lookup) {
  thumbnailOf = lookup;
  showThumb();
  if (isOpen()) show(shownEntries());
}

function pick(entry) {
  chosen = entry;
  input.value = entry.name;
  close();
  showThumb();
  input.dispatchEvent(new Event("change"));
}

function showThumb() {
  const url = chosen && chosen.index !== null ? thumbnailOf(chosen.index) : null;
  thumb.hidden = !url;
  if (url) thumb.src = url;
}

/** Entries of which a name has every word that was typed; those that begin with it come first. */
function matches(text) {
  const words = plain(text).split(" ");
  const has = ({ keys }) => keys.some((key) => words.every((word) => key.includes(word)));
  const begins = ({ keys }) => keys.some((key) => key.startsWith(plain(text)));
  const found = entries.filter(has);
  return [...found.filter(begins), ...found.filter((entry) => !begins(entry))];
}

const shownEntries = () => (input.value === chosen?.name ? entries : matches(input.value));

function show(found) {
  list.replaceChildren(...found.map(option));
  list.hidden = false;
  input.setAttribute("aria-expanded", "true");
  const at = found.indexOf(chosen);
  activate(found.length ? Math.max(at, 0) : -1);
  field("class-none").hidden = found.length > 0;
}

function option(entry, position) {
  const url = entry.index === null ? null : thumbnailOf(entry.index);
  const others = entry.names.slice(1).join(", ");
  const node = element(
    "li",
    { id: `class-option-${position}`, role: "option", ariaSelected: String(entry === chosen) },
    ...(url ? [element("img", { src: url, alt: "", className: "thumb" })] : []),
    element("span", {}, entry.name),
    ...(others ? [element("small", {}, others)] : []),
  );
  node.addEventListener("click", () => pick(entry));
  node.entry = entry;
  return node;
}

function activate(position) {
  list.children[active]?.classList.remove("active");
  active = position;
  const node = list.children[active];
  if (!node) return input.removeAttribute("aria-activedescendant");
  node.classList.add("active");
  input.setAttribute("aria-activedescendant", node.id);
  node.scrollIntoView({ block: "nearest" });
}

function close() {
  list.hidden = field("class-none").hidden = true;
  list.replaceChildren();
  input.setAttribute("aria-expanded", "false");
  input.removeAttribute("aria-activedescendant");
  say(field("class-count"), "");
}

function giveUp() {
  input.value = chosen?.name ?? "";
  close();
}

function move(by) {
  if (!isOpen()) return show(shownEntries());
  const last = list.children.length - 1;
  const one = Math.abs(by) === 1;
  const wrapped = active + by > last ? 0 : last;
  activate(active + by < 0 || active + by > last ? (one ? wrapped : by < 0 ? 0 : last) : active + by);
}

const KEYS = { ArrowDown: () => move(1), ArrowUp: () => move(-1), PageDown: () => move(PAGE), PageUp: () => move(-PAGE) };

input.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const act = KEYS[event.key];
  if (act) {
    act();
  } else if (event.key === "Enter" && isOpen()) {
    if (list.children[active]) pick(list.children[active].entry); // else nothing is called that, and Enter does nothing
  } else if (event.key === "Escape" && (isOpen() || input.value !== chosen?.name)) {
    giveUp();
    input.select();
  } else {
    return;
  }
  event.preventDefault();
});
input.addEventListener("input", () => {
  const found = input.value.trim() ? matches(input.value) : entries;
  show(found);
  if (found.length) activate(0);
  say(field("class-count"), found.length ? count(found.length, "class", "classes") : "No class is called that.");
});
input.addEventListener("focus", () => input.select());
input.addEventListener("click", () => {
  if (isOpen()) return;
  input.select();
  show(entries);
});
input.addEventListener("blur", () => {
  const exact = entries.find(({ keys }) => keys.includes(plain(input.value)));
  if (isOpen() && exact && exact !== chosen && input.value !== chosen?.name) pick(exact);
  else giveUp();
});
// The list never takes the focus, so that typing goes on.
list.addEventListener("pointerdown", (event) => event.preventDefault());
