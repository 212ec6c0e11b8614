// The key field, which is there only once the server has asked for a key.

import { field, say } from "./dom.js";
import { keepKey, readKey } from "./http.js";

const form = field("key-form");
const input = field("key");

/** `changed` is called when there is a new key, or none any more. */
export function installKey(changed) {
  document.addEventListener("key-needed", ({ detail: { refused } }) => {
    const wasHidden = form.hidden;
    form.hidden = false;
    complain(refused ? "The server does not know this key." : "");
    if (wasHidden || refused) input.focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) return complain("A key is one word of letters, digits and signs.");
    accept(key);
  });
  field("key-forget").addEventListener("click", () => {
    accept("");
    field("class-label").focus(); // the button goes away
  });
  tell();

  function accept(key) {
    complain("");
    input.value = "";
    form.hidden = true;
    keepKey(key);
    tell();
    changed();
  }
}

function tell() {
  field("key-forget-field").hidden = !readKey();
}

function complain(text) {
  say(field("key-error"), text);
  if (text) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}
