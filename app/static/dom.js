// Elements by id, and made ones.

export const field = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

/** Sets a text that is read out when it changes, and only then. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const count = (number, word, plural = `${word}s`) => `${number} ${number === 1 ? word : plural}`;
