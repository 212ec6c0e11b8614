"""Encoded pictures → a Dataset: broken ones left out by name, a test part found or held out, small sets decoded once into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.config import DataConfig
from training.data.dataset import HELD_OUT, Dataset, Split, held_out
from training.data.encoded import Findings, Form, Pictures, Source, extremes, look_through, looked_through

MEMORY_BYTES = 2**30  # of decoded pictures; a process of several holds them too
_MOST_BROKEN = 10  # more than one in ten is no accident
_NAMED = 3


@dataclass(frozen=True)
class _Part:
    source: Source
    rows: np.ndarray  # of pictures that can be read
    findings: Findings
    decoded: Tensor | None  # (N, C, H, W), broken ones included

    def split(self, form: Form, chosen: Tensor | None = None) -> Split:
        """All its pictures, or those where `chosen` is true."""
        rows = self.rows if chosen is None else self.rows[chosen.numpy()]
        labels = torch.from_numpy(self.source.labels[rows])
        return Split(Pictures(self.source, rows, form) if self.decoded is None else self.decoded[rows], labels)


def assemble(sources: Sequence[Source], names: tuple[str, ...], config: DataConfig, what: str, kept_in: Path) -> Dataset:
    """`sources` are the training and the test part, or one that is to be divided; `what` says what and where they are.

    ValueError if too many pictures are broken, a class has none, or there are too few to hold some out.
    """
    form = Form(config.image_channels, config.image_size)
    in_memory = sum(len(source.labels) for source in sources) * form.bytes <= MEMORY_BYTES
    parts = [_part(source, names, form, None if in_memory else kept_in) for source in sources]
    if len(parts) == 2:
        train, test = (part.split(form) for part in parts)
    else:
        chosen = held_out(torch.from_numpy(parts[0].source.labels[parts[0].rows]), len(names))
        train, test = parts[0].split(form, ~chosen), parts[0].split(form, chosen)
    if not len(train) or not len(test):
        raise ValueError(f"{what} gives {len(train)} training and {len(test)} test images; at least {HELD_OUT} a class are needed")
    skipped = {part.source.title(row): why for part in parts for row, why in part.findings.broken.items()}
    told = f"{what}: {len(train)} training and {len(test)} test images" + (f", {len(skipped)} skipped" if skipped else "")
    return Dataset(train, test, names, told, skipped, tuple(extremes([size for part in parts for size in part.findings.sizes])))


def _part(source: Source, names: tuple[str, ...], form: Form, kept_in: Path | None) -> _Part:
    count, decoded = len(source.labels), None
    if kept_in is None:
        pixels = np.zeros((count, form.channels, form.size, form.size), dtype=np.uint8)
        findings, decoded = look_through(source, form, pixels), torch.from_numpy(pixels)
    else:
        findings = looked_through(source, form, kept_in)
    if len(findings.broken) * _MOST_BROKEN > count:
        some = [f"{source.title(row)} {why}" for row, why in list(findings.broken.items())[:_NAMED]]
        raise ValueError(f"{len(findings.broken)} of {count} pictures are broken, more than one in {_MOST_BROKEN}: {'; '.join(some)}")
    rows = np.setdiff1d(np.arange(count), np.fromiter(findings.broken, dtype=np.int64))
    counts = np.bincount(source.labels[rows], minlength=len(names))
    if not counts.all():
        raise ValueError(f"class {names[int(counts.argmin())]} has no picture that can be read")
    return _Part(source, rows, findings, decoded)
