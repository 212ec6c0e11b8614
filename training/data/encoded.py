"""Pictures as files hold them: many more than fit in memory, each decoded when it is asked for, in threads.

Every picture is decoded once before anything begins, so that a broken one is known by name then and not after an hour. What that found
out about a set that stays on disk is kept (`runs/data/HASH.json`), so that it is done once.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.data.once import once
from training.data.pixels import Size, Unreadable, decode

_CHUNK = 1024  # pictures that wait in the threads' queue


class Source(Protocol):
    """Encoded pictures that lie on disk."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""

    @property
    def stamp(self) -> bytes:
        """Of the files' names, sizes and times of change."""

    def title(self, row: int) -> str:
        """Where a picture lies, for people."""

    def open(self, row: int) -> BinaryIO:
        """The bytes of a picture."""


@dataclass(frozen=True)
class Form:
    """What the pictures become."""

    channels: int
    size: int

    @property
    def bytes(self) -> int:
        return self.channels * self.size * self.size


@dataclass(frozen=True)
class Pictures:
    """Rows of a source, in the place of a tensor (N, C, H, W) uint8."""

    source: Source
    rows: np.ndarray  # (N,) int64
    form: Form

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.rows), self.form.channels, self.form.size, self.form.size

    @property
    def stamp(self) -> bytes:
        return self.source.stamp + hashlib.sha256(self.rows.tobytes()).digest()

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.from_numpy(np.stack(list(_threads().map(self._one, self.rows[index.numpy()].tolist()))))

    def _one(self, row: int) -> np.ndarray:
        try:
            with self.source.open(row) as file:
                return decode(file, self.form.channels, self.form.size)[0]
        except (Unreadable, OSError) as error:
            raise ValueError(f"{self.source.title(row)}, which was fine before training began, {error}") from error


@cache
def _threads() -> ThreadPoolExecutor:
    """As many as this process has cores; Pillow lets go of the interpreter while it decodes. Processes of one machine share its cores."""
    return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), "decode")


@dataclass(frozen=True)
class Findings:
    """What decoding every picture of a source told."""

    broken: dict[int, str]  # row → why
    sizes: list[Size]  # the smallest and the largest picture by pixels; empty if all are broken


def _one_by_one(source: Source, form: Form) -> Iterator[tuple[np.ndarray | None, Size, str]]:
    """Pixels and size of each picture in turn, or None and why."""

    def look(row: int) -> tuple[np.ndarray | None, Size, str]:
        try:
            with source.open(row) as file:
                return *decode(file, form.channels, form.size), ""
        except (Unreadable, OSError) as error:
            return None, (0, 0), str(error)

    with tqdm(total=len(source.labels), desc="pictures", unit="picture", dynamic_ncols=True, delay=2) as bar:
        for start in range(0, len(source.labels), _CHUNK):
            for found in _threads().map(look, range(start, min(start + _CHUNK, len(source.labels)))):
                yield found
                bar.update()


def look_through(source: Source, form: Form, into: np.ndarray | None = None) -> Findings:
    """Decode every picture; the pixels go `into` (N, C, H, W), or nowhere. Rows of broken ones are left as they are."""
    broken: dict[int, str] = {}
    sizes: list[Size] = []
    for row, (pixels, size, why) in enumerate(_one_by_one(source, form)):
        if pixels is None:
            broken[row] = why
            continue
        sizes = extremes([*sizes, size])
        if into is not None:
            into[row] = pixels
    return Findings(broken, sizes)


def extremes(sizes: Sequence[Size]) -> list[Size]:
    """The smallest and the largest of them, by pixels."""
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    return [by_area[0], by_area[-1]] if by_area else []


def looked_through(source: Source, form: Form, kept_in: Path) -> Findings:
    """The same, once for all processes and for all time: kept until the files change."""
    path = kept_in / f"{hashlib.sha256(source.stamp + repr(form).encode()).hexdigest()[:16]}.json"
    once(path, lambda to: to.write_text(json.dumps(asdict(look_through(source, form))) + "\n"))
    kept = json.loads(path.read_text())
    return Findings({int(row): why for row, why in kept["broken"].items()}, [(w, h) for w, h in kept["sizes"]])
