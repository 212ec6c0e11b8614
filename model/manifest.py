"""`checkpoint.json` as bytes that anybody may have written: read within bounds, and checked for its form before anything is believed."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "checkpoint.json"
LATEST = "latest"
_MOST_BYTES = 1 << 22  # of a manifest; the bundled one has 21 kB, most of it what `dit tune` measured
_LONGEST_NAME = 255  # bytes, of a file


class CheckpointError(ValueError):
    """A folder that is not a sound checkpoint; the message names the file or key that is wrong."""


@dataclass(frozen=True)
class FileEntry:
    """What the manifest vouches for."""

    sha256: str
    bytes: int


def read_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes, and the object that they are. CheckpointError for anything else, OSError where there is no such file."""
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise CheckpointError(f"{path} cannot be read: it has more than {_MOST_BYTES} bytes")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    return raw, document


def file_entries(document: dict[str, Any], path: Path) -> dict[str, FileEntry]:
    """Its `files`: a name that lies beside the manifest, a sha256 and a length for each. `path` is for the message."""
    files = document.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} cannot be read: its files are no JSON object")
    for name, entry in files.items():
        if not is_plain_name(name):
            raise CheckpointError(f"{path} names a file {name[:60]!a}, which cannot lie beside it")
        sound = isinstance(entry, dict) and _is_sha256(entry.get("sha256")) and _is_length(entry.get("bytes"))
        if not sound:
            raise CheckpointError(f"{path} has no sha256 and length of {name[:60]!a} among its files")
    return {name: FileEntry(entry["sha256"], entry["bytes"]) for name, entry in files.items()}


def is_plain_name(name: str) -> bool:
    """Whether it is that of a file or folder here: it leads nowhere else, and a file system takes it."""
    try:
        return Path(name).name == name != ".." and "\0" not in name and 0 < len(os.fsencode(name)) <= _LONGEST_NAME
    except UnicodeEncodeError:  # a lone surrogate
        return False


def read_latest(path: Path) -> str:
    """The name in a file `latest`, as far as it can be one."""
    with path.open("rb") as file:
        return file.read(4 * _LONGEST_NAME).decode(errors="replace").strip()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
