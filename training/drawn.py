"""Many pictures, drawn and judged batch by batch: what is kept of them is small. Shapes: N pictures · B of a batch · K classes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from training.judgement import Judge, Judgement, joined
from training.memorisation import thumbnails

GRID_COLUMNS, GRID_MAX_ROWS = 10, 40


class Writer(Protocol):
    def add(self, images: Tensor) -> None:
        """Pictures (B, H, W, C) uint8."""

    def close(self) -> None:
        """After the last, or where it was stopped."""


@dataclass(frozen=True)
class Drawn:
    labels: Tensor  # (N,) asked for
    judged: dict[str, Judgement]  # by judge
    thumbnails: Tensor  # (N, P)
    shown: Tensor  # (rows · columns, H, W, C) uint8: the first pictures of every class that fits a grid, row by row


def draw_and_judge(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], asked: Tensor, classes: int, judges: Mapping[str, Judge], writers: Sequence[Writer]
) -> Drawn:
    """The pictures of labels asked for (N,), as `Drawer.pictures` gives them."""
    small, grid = list[Tensor](), _Grid(classes, len(asked))
    judged: dict[str, list[Judgement]] = {name: [] for name in judges}
    with ExitStack() as stack, tqdm(total=len(asked), desc="pictures", unit="picture", dynamic_ncols=True) as bar:
        for writer in writers:
            stack.callback(writer.close)
        for labels, _, images in batches:
            pictures = images.permute(0, 3, 1, 2)
            for name, judge in judges.items():
                judged[name].append(judge.judge(pictures))
            for writer in writers:
                writer.add(images)
            small.append(thumbnails(pictures))
            grid.add(labels, images)
            bar.update(len(labels))
    return Drawn(asked, {name: joined(parts) for name, parts in judged.items()}, torch.cat(small), grid.pictures())


class _Grid:
    """Keeps the first pictures of each of the first classes; where random labels gave too few, the grid stays black."""

    def __init__(self, classes: int, count: int) -> None:
        self.columns = max(1, min(GRID_COLUMNS, count // classes))
        self.kept: list[list[Tensor]] = [[] for _ in range(min(GRID_MAX_ROWS, classes))]

    def add(self, labels: Tensor, images: Tensor) -> None:
        for label, row in enumerate(self.kept):
            if len(row) < self.columns:
                row.extend(images[labels == label][: self.columns - len(row)])

    def pictures(self) -> Tensor:
        empty = torch.zeros_like(next(image for row in self.kept for image in row))
        return torch.stack([image for row in self.kept for image in [*row, *[empty] * (self.columns - len(row))]])
