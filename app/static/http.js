// The page's HTTP calls: whatever is not a good answer becomes one kind of error (RFC 9457), and a key goes along once there is one.

const KEY = "dit-key"; // in sessionStorage: it is gone with the tab
const GONE = new Set([401, 403, 404, 410]); // asking again would not help

export class Problem extends Error {
  constructor({ type = "", title, detail = "", status = 0, errors = [], retryAfter = null }) {
    super(title);
    Object.assign(this, { type, title, detail, status, errors, retryAfter });
  }

  /** The server is there, and Redis behind it is away, full or cannot write. */
  get isOfQueue() {
    return this.type.startsWith("urn:dit:problem:redis-");
  }

  get isFinal() {
    return GONE.has(this.status);
  }
}

export const readKey = () => sessionStorage.getItem(KEY);

export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** The response, if it is a good one. A 401 is told to the whole document too, as `key-needed`. */
export async function request(method, path, { body, headers = {}, accept = "application/json", signal } = {}) {
  const key = readKey();
  const sent = { Accept: accept, ...headers };
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "The server does not answer", detail: "Is it running?" });
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: { refused: Boolean(key) } }));
  throw await problemOf(response);
}

async function problemOf(response) {
  const { status, headers } = response;
  const told = await response.json().catch(() => ({}));
  return new Problem({ title: `The server answered ${status}`, ...told, status, retryAfter: headers.get("Retry-After") });
}

/** JSON in, JSON out. */
export async function call(method, path, body) {
  const response = await request(method, path, { body });
  try {
    return await response.json();
  } catch {
    throw new Problem({ title: "The server broke off in the middle of its answer" });
  }
}

/** The bytes of a picture. Pictures are fetched, not linked: a link could not carry the key. */
export async function pictureBytes(path) {
  const response = await request("GET", path, { accept: "image/png" });
  try {
    return await response.arrayBuffer();
  } catch {
    throw new Problem({ title: "The server broke off in the middle of a picture" });
  }
}
