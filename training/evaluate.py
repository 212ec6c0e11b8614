"""`dit evaluate CHECKPOINT`: how good a checkpoint's pictures are, in numbers, plots and its model card.

With `--data` the judge is a small classifier trained on the same training images, and each measure stands beside its floor
(training/local_measures.py); with `--reference` and `--inception` it is the paper's protocol (training/inception_measures.py).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointConfig, resolve
from training.card_metrics import GRID, table
from training.classifier import ClassifierConfig
from training.draw import ALL_CHANNELS, Drawer, Setting, asked_labels, default_setting, load_as_served
from training.drawn import Drawn, Writer, draw_and_judge
from training.evaluation_files import keep, plots_of
from training.inception_measures import INCEPTION, InceptionJudge, open_inception
from training.judgement import Judge
from training.local_measures import LOCAL, Local, LocalJudge, open_local, require_pictures
from training.neighbours import NEIGHBOURS
from training.picture_writers import NpzWriter, PngWriter
from training.runlog import command, commit, hardware

_COMPILE_FROM = 1000  # pictures: compiling takes a minute
ROUNDING = "nearest"  # of 127.5·(x + 1): the same as the paper's clamp(127.5·x + 128, 0, 255), cut off


def evaluate(
    checkpoint_path: Path,
    data: Path | None = None,
    *,
    reference: Path | None = None,
    inception: Path | None = None,
    samples: int = 10_000,
    labels: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_channels: str = ALL_CHANNELS,
    sampler: str | None = None,
    save_npz: Path | None = None,
    save_png: Path | None = None,
    batch_size: int = 250,
    cache: Path = Path("runs/classifiers"),
    save: bool = True,
    show: Callable[[str], None] = print,
    classifier_config: ClassifierConfig | None = None,
) -> dict[str, Any]:
    """Measure, print the table, and with `save` keep metrics, model card, grid and plots in the checkpoint. Returns its metrics.

    `labels` are by default in equal shares with `data`, else drawn as by the paper's script. What an earlier call measured with the other
    judge stays. Raises ValueError for settings the checkpoint cannot run, for data of other classes, for files that are not what they
    should be, and for a checkpoint without a VAE, before the first picture is drawn.
    """
    began = time.perf_counter()
    folder = resolve(checkpoint_path)  # once, so that a version published meanwhile does not get these metrics
    checkpoint = load_as_served(folder)
    setting = replace(default_setting(checkpoint.config, steps, guidance_scale, sampler), guidance_channels=guidance_channels)
    _check(checkpoint.config, setting, samples)
    labels = labels or ("balanced" if data else "random")
    asked = asked_labels(labels, samples, len(checkpoint.labels))
    writers = _writers(save_npz, save_png, samples)
    if not (data or reference or inception or writers):
        raise ValueError("nothing to do: give --data, or --reference and --inception, or --save-npz or --save-png")
    paper = open_inception(inception, reference, checkpoint.device) if reference or inception else None
    local = open_local(checkpoint, data, cache, classifier_config, show) if data else None

    drawer = Drawer(checkpoint, min(batch_size, samples), compile=samples >= _COMPILE_FROM)
    drawn = draw_and_judge(drawer.pictures(setting, asked), asked, len(checkpoint.labels), _judges(local, paper), writers)
    found = local.measure(drawer.vae, drawn, batch_size) if local else None
    facts = {"samples": samples, **setting.entry(), "labels": labels, "rounding": ROUNDING, "dtype": drawer.dtype}
    measured = _record(found, paper, drawn, facts, began)
    for line in table(measured):
        show(line)
    if save and measured:
        plots = plots_of(drawer, setting, drawn, found) if found else {}
        measured = keep(folder, checkpoint, drawn.shown, measured, plots)
        show(f"wrote metrics, README.md and {', '.join([GRID, *plots])} to {folder}")
    return measured


def _check(config: CheckpointConfig, setting: Setting, samples: int) -> None:
    setting.table(config)
    require_pictures(config, samples)
    if samples <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} pictures, got samples {samples}")


def _writers(save_npz: Path | None, save_png: Path | None, samples: int) -> list[Writer]:
    return [*([NpzWriter(save_npz, samples)] if save_npz else []), *([PngWriter(save_png)] if save_png else [])]


def _judges(local: LocalJudge | None, paper: InceptionJudge | None) -> dict[str, Judge]:
    return {**({LOCAL: local.classifier} if local else {}), **({INCEPTION: paper.network} if paper else {})}


def _record(found: Local | None, paper: InceptionJudge | None, drawn: Drawn, facts: dict[str, Any], began: float) -> dict[str, Any]:
    """What is kept: the classifier's numbers beside how the pictures were drawn, Inception's with an account of their own."""
    numbers = paper.measures(drawn.judged[INCEPTION]) if paper else {}
    minutes = round((time.perf_counter() - began) / 60, 1)
    facts = {**facts, "command": command(), "hardware": hardware(), "commit": commit(), "minutes": minutes}
    return {**(found.metrics | facts if found else {}), **numbers, **({INCEPTION: facts | paper.told} if paper else {})}
