"""What an evaluation leaves in a checkpoint: metrics, model card, grid and plots. The checkpoint's hash stays."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointConfig, annotate, read_config
from training.card import model_card
from training.card_metrics import EVALUATION_PLOT, GRID, NEIGHBOURS_PLOT
from training.draw import Drawer, Setting
from training.drawn import GRID_MAX_ROWS, Drawn
from training.evaluation_plots import evaluation_plot, neighbours_plot
from training.inception_measures import INCEPTION, NAMES
from training.local_measures import LOCAL, Local
from training.loop import grid

_SHOWN = 6  # pictures nearest to a training image, and as many at random
_INCEPTIONS = {INCEPTION, *NAMES.values()}


def unchanged(folder: Path, checkpoint: Checkpoint) -> CheckpointConfig:
    """What the folder says by now: another command may have measured it meanwhile. ValueError if it has other weights."""
    config, found = read_config(folder)
    if found != checkpoint.hash:
        raise ValueError(f"{folder} was replaced by other weights meanwhile; what was measured is not kept in it")
    return config


def keep(folder: Path, checkpoint: Checkpoint, shown: Tensor, measured: dict[str, Any], plots: dict[str, bytes]) -> dict[str, Any]:
    """Write it, and return the metrics: what was measured now and, by the other judge, before."""
    config = unchanged(folder, checkpoint)
    metrics = _with_others(config.metrics, measured)
    rows = min(GRID_MAX_ROWS, len(config.labels))
    file = io.BytesIO()
    grid(shown, columns=len(shown) // rows, scale=2 if config.image_size <= 64 else 1).save(file, "PNG", optimize=True)
    annotate(folder, metrics=metrics, card=model_card(config, metrics), files={GRID: file.getvalue(), **plots})
    return metrics


def _with_others(before: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Each judge's numbers are replaced together, so that no number stands beside settings that it was not measured with."""

    def stays(name: str) -> bool:
        return (INCEPTION if name in _INCEPTIONS else LOCAL) not in measured

    return {name: value for name, value in before.items() if stays(name)} | measured


def plots_of(drawer: Drawer, setting: Setting, drawn: Drawn, found: Local) -> dict[str, bytes]:
    """By file name."""
    return {
        EVALUATION_PLOT: evaluation_plot({**found.metrics, "samples": len(drawn.labels)}, found.dataset.class_names),
        NEIGHBOURS_PLOT: _neighbours(drawer, setting, drawn, found),
    }


def _neighbours(drawer: Drawer, setting: Setting, drawn: Drawn, found: Local) -> bytes:
    """The pictures are drawn again from their seeds: to keep all of them would take gigabytes."""
    distances, indices = found.memorisation.distances, found.memorisation.indices
    chosen = _chosen(distances[:, 0])
    pictures = drawer.draw(setting, drawn.labels[chosen], chosen)
    training = found.dataset.train
    rows = torch.cat(list(training.batches(100, indices[chosen].flatten()))).unflatten(0, (len(chosen), -1)).permute(0, 1, 3, 4, 2)
    names = found.dataset.class_names
    titles = [f"{names[label]}"[:12] for label in drawn.labels[chosen].tolist()]
    return neighbours_plot(pictures, rows, distances[chosen], titles, min(_SHOWN, len(chosen)))


def _chosen(distances: Tensor) -> Tensor:
    """The pictures nearest to a training image, and some at random, always the same ones."""
    order = distances.argsort()
    others = order[_SHOWN:]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:_SHOWN]
    return torch.cat([order[:_SHOWN], others[drawn]])
