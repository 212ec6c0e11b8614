"""The plots of a model card: how near the pictures come to real images, class by class, and whether they repeat training images."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

_DOTS_PER_INCH = 110
_SETS = (("pictures", "", "C0"), ("reconstructions", "_reconstructions", "C1"), ("real images", "_train", "0.6"))
_BARS = 40  # classes that have a bar each; more are drawn as one line, from the worst to the best


def evaluation_plot(metrics: dict[str, Any], class_names: Sequence[str]) -> bytes:
    """A PNG: precision, recall and class consistency beside their floors, and the last by class beside the classifier's accuracy."""
    few = len(class_names) <= _BARS
    figure = Figure(figsize=(10, max(4.0, 0.28 * len(class_names)) if few else 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _shares(left, metrics)
    if few:
        _bars(right, metrics, class_names)
    else:
        _curve(right, metrics)
    return _png(figure)


def _shares(axes: Axes, metrics: dict[str, Any]) -> None:
    measures = ("precision", "recall", "class consistency")
    for i, (title, suffix, colour) in enumerate(_SETS):
        consistency = "classifier_accuracy" if suffix == "_train" else f"class_consistency{suffix}"
        values = [100 * metrics[name] for name in (f"precision{suffix}", f"recall{suffix}", consistency)]
        bars = axes.bar(np.arange(3) + 0.28 * (i - 1), values, 0.26, label=title, color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(3), measures)
    axes.set(ylim=(0, 119), yticks=range(0, 101, 20), ylabel="%", title=f"{metrics['samples']} pictures")
    axes.legend(loc="upper center", ncols=3, fontsize=7, frameon=False, handlelength=1.2, columnspacing=1)


def _bars(axes: Axes, metrics: dict[str, Any], class_names: Sequence[str]) -> None:
    rows = np.arange(len(class_names))
    for name, title, colour, shift in (
        ("class_consistencies", "pictures", "C0", -0.2),
        ("class_accuracies", "test images", "0.6", 0.2),
    ):
        axes.barh(rows + shift, [100 * (value or 0) for value in metrics[name]], 0.38, label=title, color=colour)
    axes.set_yticks(rows, class_names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% that the classifier takes for the class asked for")
    axes.set_title("class consistency", loc="left")
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _curve(axes: Axes, metrics: dict[str, Any]) -> None:
    for name, title, colour in (("class_consistencies", "pictures", "C0"), ("class_accuracies", "test images", "0.6")):
        axes.plot(sorted(100 * value for value in metrics[name] if value is not None), label=title, color=colour)
    axes.set(ylim=(0, 100), xlabel="classes, the worst first", ylabel="%", title="class consistency")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def neighbours_plot(pictures: Tensor, neighbours: Tensor, distances: Tensor, titles: Sequence[str], nearest: int) -> bytes:
    """A PNG. Pictures (N, H, W, C), their neighbours (N, k, H, W, C), uint8, the distances (N, k) in grey levels, and N titles.

    The first `nearest` of them stand left, as those nearest to a training image, the others right, as chosen at random.
    """
    images = torch.cat([pictures[:, None], neighbours], 1)
    captions = [[title, *(f"{d:.1f}" for d in row)] for title, row in zip(titles, distances.tolist(), strict=True)]
    rows = max(nearest, len(pictures) - nearest)
    figure = Figure(figsize=(2.0 * images.shape[1], 1.22 * rows + 0.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _sheet(left, "nearest to a training image", images[:nearest], captions[:nearest])
    _sheet(right, "at random", images[nearest:], captions[nearest:])
    return _png(figure)


def _sheet(axes: Axes, title: str, images: Tensor, captions: Sequence[Sequence[str]]) -> None:
    """Rows of images (R, K, H, W, C), each under its caption, in one piece: axes for each would take seconds."""
    axes.set_axis_off()
    if not captions:
        return
    rows, columns, height, width, _ = images.shape
    above, beside = -(-height // 4), -(-width // 10)
    canvas = images.new_full((rows, columns, height + above, width + beside, 3), 255)
    canvas[:, :, above:, :width] = images
    axes.imshow(canvas.transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    for i, row in enumerate(captions):
        for j, caption in enumerate(row):
            x, y = j * (width + beside) + width / 2, i * (height + above) + 0.8 * above
            axes.text(x, y, caption, fontsize=7, color="0.3" if j else "C0", ha="center", va="baseline")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()
