"""`dit up --model`: which checkpoint folder a path or hub id stands for, imported first where that is needed. Imports no torch."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_READ = (".", "transformer", "vae", "scheduler")  # the folders whose files `dit import` reads
_POLL_S = 0.1


def checkpoint_folder(model: str, data: Path, stop: threading.Event, say: Callable[[str], None]) -> Path:
    """A checkpoint folder or registry entry as it is; what `dit import` takes, imported once for as long as it stays the same.

    Raises ValueError for what has no VAE, and SystemExit if the import fails, which says why itself.
    """
    folder = Path(model)
    if not _is_checkpoint(folder):
        folder = imported_folder(model, data)
        if not _is_checkpoint(folder):
            if not folder_or_id(model):
                raise ValueError(f"there is no file or folder {model}, nor can it be a hub id such as facebook/DiT-XL-2-256")
            say(f"importing {model} to {folder.resolve()}")
            _import(model, folder, stop)
        if not stop.is_set() and json.loads((folder / "checkpoint.json").read_bytes())["vae"] is None:
            raise ValueError(f"{model} has no VAE, so it cannot be served; give it one with: dit import {model} DEST --vae …")
    return folder.resolve()


def folder_or_id(source: str) -> bool:
    """Whether `dit import` could find it: it exists, or has the form of a hub id."""
    return Path(source).exists() or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None


def imported_folder(source: str, data: Path) -> Path:
    """Where `source` is imported to: another folder once a file of it has another size or time. A hub id is taken to stay what it is."""
    path = Path(source)
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else source.rpartition("/")[2]
    identity = _files(path.resolve()) if path.exists() else source
    short = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return data / "imported" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).lstrip('.') or 'model'}-{short}"


def _is_checkpoint(path: Path) -> bool:
    return (path / "checkpoint.json").is_file() or (path / "latest").is_file()


def _files(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for part in _READ for file in (path / part).glob("*") if file.is_file())
    return "\n".join([str(path), *(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)])


def _import(source: str, folder: Path, stop: threading.Event) -> None:
    """By a process of its own, which is stopped if we are; half of an import is never left."""
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "import", source, str(folder)], stdin=subprocess.DEVNULL, process_group=0)
    while process.poll() is None and not stop.wait(_POLL_S):
        pass
    process.terminate()  # does nothing if it has ended
    process.wait()
    for staged in folder.parent.glob(f".{folder.name}.new-*"):
        shutil.rmtree(staged)
    if process.returncode and not stop.is_set():
        raise SystemExit(1)
