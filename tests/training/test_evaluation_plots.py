"""The plots of a model card, whatever the number of classes."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.evaluation_plots import evaluation_plot, neighbours_plot

BLUE = (31, 119, 180)  # of the pictures' bars and lines


def metrics_of(classes: int, consistency: float) -> dict[str, Any]:
    shares = ("precision", "recall", "class_consistency")
    named = {name + suffix: 0.5 for name in shares for suffix in ("", "_reconstructions", "_train")}
    consistencies = [*[consistency] * (classes - 1), None]  # with random labels a class may have no picture
    return {"samples": 9, "classifier_accuracy": 0.5, **named, "class_consistencies": consistencies, "class_accuracies": [0.5] * classes}


def blue(png: bytes) -> int:
    with Image.open(io.BytesIO(png)) as picture:
        return int((np.abs(np.asarray(picture.convert("RGB")).astype(int) - BLUE).max(2) < 8).sum())


def test_a_better_class_has_the_longer_bar() -> None:
    names = [f"class {i}" for i in range(6)]
    worse, better = (blue(evaluation_plot(metrics_of(6, share), names)) for share in (0.3, 0.9))
    assert worse < better


def test_a_thousand_classes_are_one_line_from_the_worst_to_the_best() -> None:
    plots = [evaluation_plot(metrics_of(1000, share), [str(i) for i in range(1000)]) for share in (0.3, 0.9)]
    assert plots[0] != plots[1] and min(map(blue, plots)) > 500
    with Image.open(io.BytesIO(plots[0])) as picture:
        assert picture.size[0] > picture.size[1]


def test_each_picture_stands_beside_its_neighbours() -> None:
    black, white = torch.zeros(12, 8, 8, 3, dtype=torch.uint8), torch.full((12, 5, 8, 8, 3), 255, dtype=torch.uint8)
    png = neighbours_plot(black, white, torch.full((12, 5), 4.5), [f"class {i}" for i in range(12)], nearest=6)
    with Image.open(io.BytesIO(png)) as picture:
        grey = np.asarray(picture.convert("L"))
    assert 0.08 < (grey < 5).mean() < 0.25, "a picture of every six"
    few = neighbours_plot(black[:4], white[:4], torch.full((4, 5), 4.5), ["a", "b", "c", "d"], nearest=4)
    with Image.open(io.BytesIO(few)) as picture:
        assert picture.height < grey.shape[0], "so few that none is left to choose at random"
