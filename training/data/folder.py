"""One sub-folder of picture files per class; either so in the folder itself, or in its train/ and test/."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training.config import DataConfig
from training.data.assemble import assemble
from training.data.dataset import Dataset
from training.data.pixels import SUFFIXES


@dataclass(frozen=True)
class Files:
    root: Path
    names: list[str]  # relative to the root
    labels: np.ndarray
    stamp: bytes

    def title(self, row: int) -> str:
        return str(self.root / self.names[row])

    def open(self, row: int) -> BinaryIO:
        return (self.root / self.names[row]).open("rb")


def load_folder(root: Path, config: DataConfig, kept_in: Path) -> Dataset:
    parts = [part for part in ("train", "test") if holds_folders(root / part)]
    if len(parts) == 1:
        raise ValueError(f"{root} has {parts[0]}/ with one sub-folder per class: both train/ and test/ are needed, or neither")
    folders = [root / part for part in parts] or [root]
    names = _class_names(folders[0])
    if _class_names(folders[-1]) != names:
        raise ValueError(f"{root}/train and {root}/test have different classes")
    return assemble([_files(folder, names) for folder in folders], names, config, f"image folder {root}", kept_in)


def holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(p.is_dir() for p in folder.iterdir())


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _files(root: Path, classes: tuple[str, ...]) -> Files:
    names: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256(repr(classes).encode())
    for label, name in enumerate(classes):
        found = sorted(_pictures(root / name, name), key=lambda file: file[0].split("/"))
        if not found:
            raise ValueError(f"no images ({', '.join(sorted(SUFFIXES))}) below {root / name}")
        for path, size, changed_ns in found:
            digest.update(f"{path}\0{size}\0{changed_ns}\n".encode("utf-8", "surrogateescape"))
        names += [path for path, _, _ in found]
        labels += [label] * len(found)
    return Files(root, names, np.array(labels, dtype=np.int64), digest.digest())


def _pictures(folder: Path, relative: str) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of change of every picture file below, in no order. Linked folders below a class are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _pictures(Path(entry.path), f"{relative}/{entry.name}")
            elif entry.name.lower().endswith(SUFFIXES):
                facts = entry.stat(follow_symlinks=entry.is_file())  # a link to nothing is a broken picture, which opening it will tell
                yield f"{relative}/{entry.name}", facts.st_size, facts.st_mtime_ns
