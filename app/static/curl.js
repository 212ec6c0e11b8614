// A picture as a command that makes it again, and as the name of a file.

import { readKey } from "./http.js";

export const fileName = ({ name, seed }) => `${name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "")}-${seed}.png`;

/** The request of this picture alone, every default resolved. Its pixels are the same; where it was the only one, its bytes too. */
export function requestOf({ request, class_label: label, seed }) {
  return { ...request, class_label: label, seed, num_images: 1 };
}

/** The key itself stays here: the command reads it from the environment. */
export function curlOf(picture) {
  const lines = [
    `curl --fail-with-body --silent --show-error ${quoted(`${location.origin}/generate`)}`,
    "--header 'Content-Type: application/json' --header 'Accept: image/png' --header 'Prefer: wait=60'",
    ...(readKey() ? ['--header "Authorization: Bearer $DIT_API_KEY"'] : []),
    `--data ${quoted(JSON.stringify(requestOf(picture)))}`,
    `--output ${quoted(fileName(picture))}`,
  ];
  return lines.join(" \\\n  ");
}

/** For a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
