"""What every source of pictures gives. Shapes: N pictures · B of them at once · C channels · H, W pixels, uint8 at the recipe's size."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from training.data.encoded import Pictures

HELD_OUT = 10  # of a source without a test part, every tenth picture of a class is the test set


@dataclass(frozen=True)
class Split:
    images: Tensor | Pictures  # (N, C, H, W): in memory, or read when asked for
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def read(self, index: Tensor) -> Tensor:
        """The pictures (B, C, H, W) of rows `index` (B,) int64. ValueError names one that can no longer be read."""
        return self.images[index]

    def batches(self, batch_size: int, index: Tensor | None = None) -> Iterator[Tensor]:
        """All pictures in turn, or those of rows `index` (M,), (≤ batch_size, C, H, W) at once; the next are read meanwhile."""
        parts = (torch.arange(len(self)) if index is None else index).split(batch_size)
        if isinstance(self.images, Tensor):
            yield from (self.read(part) for part in parts)
            return
        with ThreadPoolExecutor(1, "read-ahead") as ahead:
            coming = ahead.submit(self.read, parts[0])
            for part in parts[1:]:
                ready, coming = coming.result(), ahead.submit(self.read, part)
                yield ready
            yield coming.result()

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Add pixels and labels; of pictures that are not in memory, their files' names, sizes and times of change."""
        digest.update(self.images.stamp if isinstance(self.images, Pictures) else self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)

    @property
    def content_hash(self) -> str:
        """64 hex digits that change when the pictures, their size, order or labels do."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        self.hash_into(digest)
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    train: Split
    test: Split
    class_names: tuple[str, ...]
    described: str  # for the run log and the model card
    skipped: dict[str, str] = field(default_factory=dict)  # pictures that could not be read, and why
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of the smallest and the largest picture before they were cropped


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def batch_indices(length: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which samples step `step` trains on: shuffled epochs end to end, a function of the step alone, so that a resume goes on in place."""
    parts: list[Tensor] = []
    position, needed = step * batch_size, batch_size
    while needed:
        epoch, offset = divmod(position, length)
        parts.append(_order(length, epoch, seed)[offset : offset + needed])
        position, needed = position + len(parts[-1]), needed - len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)  # the next epoch's batches are made while the last of this one's are trained on
def _order(length: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def held_out(labels: Tensor, classes: int) -> Tensor:
    """(N,) bool: every tenth picture of each class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        chosen[(labels == label).nonzero()[HELD_OUT - 1 :: HELD_OUT]] = True
    return chosen
