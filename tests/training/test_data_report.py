"""What is told of the data before training begins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import Dataset, Split, report_data


def dataset(counts: list[int], channels: int = 3, size: int = 8, **more: object) -> Dataset:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    images = (labels * 20 + 30).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, size, size).contiguous()
    names = tuple(f"class {i}" for i in range(len(counts)))
    return Dataset(Split(images, labels), Split(images[:2], labels[:2]), names, f"made up: {len(labels)}", **more)


def told(made: Dataset, folder: Path) -> list[str]:
    lines: list[str] = []
    report_data(made, folder, lines.append)
    return "\n".join(lines).splitlines()


def test_every_class_is_counted_and_the_rest_told(tmp_path: Path) -> None:
    made = dataset([3, 4], skipped={"a/x.png": "cannot be read"}, sizes=((5, 6), (70, 80)))
    assert told(made, tmp_path / "run") == [
        "made up: 7",
        "class       train      test",
        "class 0         3         2",
        "class 1         4         0",
        "pictures of 5×6 to 70×80 pixels, trained on at 8×8",
        "skipped 1, all named in data.json; the first: a/x.png cannot be read",
    ]
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["classes"] == {"class 0": {"train": 3, "test": 2}, "class 1": {"train": 4, "test": 0}}
    assert facts["skipped"] == made.skipped and facts["sizes"] == [[5, 6], [70, 80]] and facts["image_shape"] == [3, 8, 8]
    assert facts["hash"] == {"train": made.train.content_hash, "test": made.test.content_hash}


def test_uneven_classes_are_warned_of(tmp_path: Path) -> None:
    assert not any("uneven" in line for line in told(dataset([3, 9]), tmp_path))
    assert (
        told(dataset([3, 10]), tmp_path)[-1] == "uneven: the largest class has 10 pictures, the smallest 3, which will be learnt less well"
    )


def test_of_very_many_classes_the_largest_and_smallest_are_listed(tmp_path: Path) -> None:
    lines = told(dataset([i % 9 + 2 for i in range(12)] + [30, 1]), tmp_path)
    names = [line.split("  ")[0].strip() for line in lines[2:15]]
    assert names[0] == "class 12" and names[6] == "…" and names[-1] == "class 13" and len(lines) == 16


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 100)])
def test_the_sheet_has_a_row_of_pictures_per_class(tmp_path: Path, channels: int, size: int) -> None:
    told(dataset([2, 9, 1], channels, size), tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "data.png"))
    assert sheet.shape == (3 * 64, 120 + 8 * 64, 3)
    for label, shown in enumerate((2, 8, 1)):
        row = sheet[label * 64 + 32, 120 + 32 :: 64, 0].tolist()
        assert row == [label * 20 + 30] * shown + [255] * (8 - shown)
        assert sheet[label * 64 : label * 64 + 64, :120].min() < 100  # its name
