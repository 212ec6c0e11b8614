"""WebDataset shards: tar files whose members `key.jpg` and `key.cls` (or `key.json` with "label") are a picture and its class.

Source of the form: https://github.com/webdataset/webdataset, "The WebDataset Format". Its own reader streams; training here draws
pictures by number, so this one notes where they lie. Nothing is unpacked, so a member's name is only a name.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training.config import DataConfig
from training.data.assemble import assemble
from training.data.dataset import Dataset
from training.data.parts import Label, numbered, parts_of, stamp_of
from training.data.pixels import SUFFIXES

_MOST_LABEL_BYTES = 2**20
_BLOCK = 512
# What tarfile raises for spoilt shards.
_SPOILT = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


@dataclass
class Sample:
    """One picture and where it lies in its shard."""

    key: str
    offset: int = -1
    size: int = 0
    label: Label | None = None


@dataclass(frozen=True)
class Shards:
    paths: list[Path]
    keys: list[str]
    places: np.ndarray  # (N, 3) int64: shard, offset, bytes
    labels: np.ndarray
    stamp: bytes

    def title(self, row: int) -> str:
        return f"{self.paths[self.places[row, 0]]}: {self.keys[row]}"

    def open(self, row: int) -> BinaryIO:
        shard, offset, size = self.places[row].tolist()
        with self.paths[shard].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def load_shards(root: Path, paths: list[Path], config: DataConfig, kept_in: Path) -> Dataset:
    parts = parts_of(root, paths)
    samples = [[list(read_shard(path)) for path in part] for part in parts]
    names, labels = numbered([[s.label for shard in part for s in shard if s.label is not None] for part in samples], config, root)
    sources = [
        Shards(
            part,
            [s.key for shard in shards for s in shard],
            np.array([(i, s.offset, s.size) for i, shard in enumerate(shards) for s in shard], dtype=np.int64).reshape(-1, 3),
            numbers,
            stamp_of(root, part),
        )
        for part, shards, numbers in zip(parts, samples, labels, strict=True)
    ]
    return assemble(sources, names, config, f"WebDataset shards {root}", kept_in)


def read_shard(path: Path) -> Iterator[Sample]:
    """Every picture with its label, in turn. ValueError says what is wrong with the shard."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar, path.stat().st_size):
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                _note(samples.setdefault(key, Sample(key)), f".{ending.lower()}", member, tar)
    except _SPOILT as error:
        raise ValueError(f"{path} cannot be read as a shard: {error or type(error).__name__}") from error
    pictures = [sample for sample in samples.values() if sample.offset >= 0]
    for sample in pictures:
        if sample.label is None:
            raise ValueError(f"{path}: {sample.key} has no label; {sample.key}.cls or .json is needed beside the picture")
    yield from pictures


def _members(tar: tarfile.TarFile, length: int) -> Iterator[tarfile.TarInfo]:
    """Plain files. tarfile takes a spoilt header for the end, and a size below zero for a way back: both are refused here."""
    for member in tar:
        if member.size < 0 or member.offset_data + (member.size if member.isreg() else 0) > length:
            raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, which the file does not hold")
        tar.members = []  # type: ignore[attr-defined]  # or it would keep millions
        if member.isreg() and not member.issparse():
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(_BLOCK)):
        raise tarfile.ReadError(f"it is damaged at byte {tar.offset}")


def _note(sample: Sample, ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    if ending in SUFFIXES:
        if sample.offset >= 0:
            raise ValueError(f"{sample.key} has two pictures")
        sample.offset, sample.size = member.offset_data, member.size
    elif ending in (".cls", ".json"):
        if member.size > _MOST_LABEL_BYTES:
            raise ValueError(f"{member.name} is too large for a label: {member.size} bytes")
        assert tar.fileobj is not None
        tar.fileobj.seek(member.offset_data)  # with extractfile an index takes half as long again
        label = _label(ending, tar.fileobj.read(member.size))
        sample.label = label if label is not None else sample.label


def _label(ending: str, raw: bytes) -> Label | None:
    """The class, as a number where it is written as one. A .json may also have none, beside a .cls."""
    text = raw.decode()
    found = json.loads(text) if ending == ".json" else text.strip()
    if isinstance(found, dict):
        found = found.get("label")
    if isinstance(found, str) and re.fullmatch("-?[0-9]{1,9}", found):
        return int(found)
    if found is None or (isinstance(found, int | str) and not isinstance(found, bool) and found != ""):
        return found
    raise ValueError(f"{text[:40]!r} is no label: a number or a word is needed")
