"""What sources of several files have in common: which file is of which part, what they are stamped by, and numbers for their classes."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.config import DataConfig
from training.data.idx import class_names

Label = int | str
_OTHER_PARTS = {"val", "valid", "validation", "dev"}


def files_of(root: Path, suffix: str) -> list[Path]:
    """In the folder itself and in its sub-folders."""
    return sorted(path for pattern in (f"*{suffix}", f"*/*{suffix}") for path in root.glob(pattern) if not path.name.startswith("."))


def parts_of(root: Path, paths: Sequence[Path]) -> list[list[Path]]:
    """The training and the test files, by the words of their names and folders, or all of them where none is called test."""
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(root)).lower())) for path in paths}
    for path in paths:
        if words[path] & _OTHER_PARTS:
            raise ValueError(f"{path} is of neither part: name it train or test, or take it out of the folder")
    test = [path for path in paths if "test" in words[path] and "train" not in words[path]]
    train = [path for path in paths if path not in test]
    if not train:
        raise ValueError(f"{root} has files called test but none for training")
    return [train, test] if test else [train]


def stamp_of(root: Path, paths: Sequence[Path]) -> bytes:
    """32 bytes of names, sizes and times of change: what is in the files is not read for it."""
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.relative_to(root)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.digest()


def numbered(parts: Sequence[Sequence[Label]], config: DataConfig, where: Path) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Class names, and the labels of each part as (N,) int64. Numbers are themselves; words are numbered in their order."""
    found = {label for part in parts for label in part}
    if all(isinstance(label, int) for label in found):
        return _numbers(parts, config, where)
    if not all(isinstance(label, str) for label in found):
        raise ValueError(f"{where} has both numbers and words for labels")
    names = tuple(sorted(str(label) for label in found))
    number = {name: i for i, name in enumerate(names)}
    return names, [np.array([number[str(label)] for label in part], dtype=np.int64) for part in parts]


def _numbers(parts: Sequence[Sequence[Label]], config: DataConfig, where: Path) -> tuple[tuple[str, ...], list[np.ndarray]]:
    found = [int(label) for part in parts for label in part]
    if not found:
        raise ValueError(f"{where} holds no pictures with labels")
    if min(found) < 0 or max(found) >= len(found):
        raise ValueError(f"{where} has labels from {min(found)} to {max(found)} on {len(found)} pictures: classes are numbered from 0")
    return class_names(max(found) + 1, config), [np.array(part, dtype=np.int64) for part in parts]
