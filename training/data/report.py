"""What the data is, before hours are spent on it: a table, `data.json` and a contact sheet `data.png` in the run's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.data.dataset import Dataset

REPORT, SHEET = "data.json", "data.png"
_MOST_LINES = 12  # of classes in the table
_MOST_ROWS, _COLUMNS = 40, 8  # of the sheet
_SIDE, _CAPTION = 64, 120  # pixels
_UNEVEN = 3.0  # times as many pictures in the largest class as in the smallest


def report_data(dataset: Dataset, folder: Path, show: Callable[[str], None] = print) -> None:
    """Write both files, and show the table."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = describe(dataset)
    (folder / REPORT).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    contact_sheet(dataset).save(folder / SHEET)
    show("\n".join(table(dataset, facts)))


def describe(dataset: Dataset) -> dict[str, Any]:
    """All that `data.json` holds."""
    train, test = (split.labels.bincount(minlength=len(dataset.class_names)).tolist() for split in (dataset.train, dataset.test))
    return {
        "data": dataset.described,
        "classes": {name: {"train": a, "test": b} for name, a, b in zip(dataset.class_names, train, test, strict=True)},
        "image_shape": list(dataset.train.image_shape),
        "sizes": [list(size) for size in dataset.sizes],
        "skipped": dataset.skipped,
        "hash": {"train": dataset.train.content_hash, "test": dataset.test.content_hash},
    }


def table(dataset: Dataset, facts: dict[str, Any]) -> list[str]:
    """The lines to print; of very many classes the largest and the smallest."""
    counts: dict[str, dict[str, int]] = facts["classes"]
    ordered = sorted(counts, key=lambda name: -counts[name]["train"]) if len(counts) > _MOST_LINES else list(counts)
    half = _MOST_LINES // 2
    shown = ordered if len(ordered) <= _MOST_LINES else [*ordered[:half], "…", *ordered[-half:]]
    wide = max(len("class"), *(len(name) for name in shown))
    cells = [("class", "train", "test")] + [(name, *map(str, counts.get(name, {"train": "…", "test": "…"}).values())) for name in shown]
    _, height, width = dataset.train.image_shape
    lines = [dataset.described, *(f"{name:<{wide}}  {train:>8}  {test:>8}" for name, train, test in cells)]
    if dataset.sizes:
        smallest, largest = (f"{w}×{h}" for w, h in dataset.sizes)
        lines.append(
            f"pictures of {smallest if smallest == largest else f'{smallest} to {largest}'} pixels, trained on at {width}×{height}"
        )
    return [*lines, *_warnings(dataset, [count["train"] for count in counts.values()])]


def _warnings(dataset: Dataset, counts: list[int]) -> list[str]:
    lines = []
    if dataset.skipped:
        name, why = next(iter(dataset.skipped.items()))
        lines.append(f"skipped {len(dataset.skipped)}, all named in {REPORT}; the first: {name} {why}")
    if max(counts) > _UNEVEN * min(counts):
        lines.append(f"uneven: the largest class has {max(counts)} pictures, the smallest {min(counts)}, which will be learnt less well")
    return lines


def contact_sheet(dataset: Dataset) -> Image.Image:
    """A row per class, of the first forty: its name, and training pictures evenly spread over it."""
    names = dataset.class_names[:_MOST_ROWS]
    sheet = Image.new("RGB", (_CAPTION + _COLUMNS * _SIDE, len(names) * _SIDE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for label, name in enumerate(names):
        rows = (dataset.train.labels == label).nonzero()[:, 0]
        chosen = rows[torch.linspace(0, len(rows) - 1, min(_COLUMNS, len(rows))).long()]
        draw.text((4, label * _SIDE + _SIDE // 2 - 8), name[:18], "black", font)
        for column, picture in enumerate(dataset.train.read(chosen) if len(chosen) else []):
            sheet.paste(_thumbnail(picture), (_CAPTION + column * _SIDE, label * _SIDE))
    return sheet


def _thumbnail(picture: Tensor) -> Image.Image:
    """(C, H, W) uint8, enlarged without blur or made smaller with it."""
    image = Image.fromarray((picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy()).convert("RGB")
    return image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST if image.width <= _SIDE else Image.Resampling.BOX)
