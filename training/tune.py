"""`dit tune CHECKPOINT --data DIR`: which steps, sampler and guidance give the best pictures for the least work, measured.

First the settings of training/search.py with few pictures each, then the best of them again with many, and only these decide. Every setting
draws the same classes from the same seeds, so that what differs between two is the setting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint import Checkpoint, annotate, resolve
from training.card import model_card
from training.card_metrics import TUNING_PLOT, setting_in_words
from training.classifier import ClassifierConfig, get_classifier
from training.draw import Drawer, load_as_served
from training.evaluation_files import unchanged
from training.local_measures import matching_dataset, require_pictures
from training.measure import Measured, MeasureLog, Meter
from training.metrics import fit_gaussian
from training.runlog import command, commit, hardware
from training.search import DRAFT, STANDARD, choose, finalists, make_grid, search
from training.tuning_plot import plot


@dataclass(frozen=True)
class Tuned:
    """Every setting measured, and the three chosen among the finals."""

    tried: list[Measured]
    finals: list[Measured]
    chosen: dict[str, Measured]  # draft, standard, best
    cached: list[Measured]  # the chosen with a block cache; it is off unless a server is told, so it is never chosen

    @property
    def measured(self) -> list[Measured]:
        return list(dict.fromkeys([*self.tried, *self.finals, *self.cached]))  # both stages may have the same number of pictures


def tune(
    checkpoint_path: Path,
    data: Path,
    *,
    steps: Sequence[int] | None = None,
    samplers: Sequence[str] | None = None,
    guidance_scales: Sequence[float] | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
    block_caches: Sequence[int] | None = None,
    samples: int = 1000,
    final_samples: int = 10_000,
    log: Path | None = None,
    save: bool = True,
    batch_size: int = 250,
    cache: Path = Path("runs/classifiers"),
    show: Callable[[str], None] = print,
    classifier_config: ClassifierConfig | None = None,
    compile: bool = True,
) -> Tuned:
    """Measure, print the finals, and with `save` keep defaults, quality, table, plot and model card in the checkpoint.

    What is not given is chosen by `make_grid`. Raises ValueError for what the checkpoint cannot do and for data of other classes.
    """
    folder = resolve(checkpoint_path)  # once, so that a version published meanwhile does not get these defaults
    checkpoint = load_as_served(folder)
    config = checkpoint.config
    require_pictures(config, samples)
    if final_samples < samples:
        raise ValueError(f"the finals need at least as many pictures as the first stage, {samples}, got {final_samples}")
    grid = make_grid(config, steps, samplers, guidance_scales, intervals, block_caches)
    dataset = matching_dataset(config, data)
    classifier = get_classifier(dataset, cache, checkpoint.device, classifier_config)
    reference = fit_gaussian(classifier.judge_split(dataset.test).features)

    drawer = Drawer(checkpoint, min(batch_size, final_samples), compile=compile)
    subject = {"checkpoint": checkpoint.hash, "classifier": classifier.key, "dtype": drawer.dtype}
    measurements = MeasureLog(log or Path("runs/tune") / f"{checkpoint.hash[:12]}.jsonl", subject)
    show(f"{drawer.dtype} on {checkpoint.device}, {'compiled' if drawer.compiled else 'not compiled'}; log {measurements.path}")
    meter = Meter(drawer, classifier, reference, measurements, show)
    tried = search(config, grid, lambda title, settings: meter.measure(title, settings, samples))
    finals = meter.measure("finals", finalists(tried), final_samples)
    chosen = choose(finals)
    with_cache = [replace(m.setting, block_cache=every) for m in dict.fromkeys(chosen.values()) for every in grid.block_caches]
    cached = meter.measure("block caches", with_cache, final_samples) if with_cache else []
    tuned = Tuned(tried, finals, chosen, cached)
    show("\n".join(table(tuned)))
    if save:
        _keep(folder, checkpoint, tuned, {**subject, "test_images": len(dataset.test)})
        show(f"wrote defaults, quality, README.md and {TUNING_PLOT} to {folder}; `dit evaluate` measures the new defaults in full")
    return tuned


def table(tuned: Tuned) -> list[str]:
    """What was measured with many pictures, cheapest first, as lines to print."""
    rows = [("evaluations", "distance", "consistency", "setting")]
    for m in sorted([*tuned.finals, *tuned.cached], key=lambda m: (m.evaluations, m.frechet_distance)):
        values = f"{m.evaluations}", f"{m.frechet_distance:.3f}", f"{100 * m.class_consistency:.1f} %"
        names = ", ".join(name for name, other in tuned.chosen.items() if other == m)
        rows.append((*values, setting_in_words(m.setting.entry()) + (f"  ← {names}" if names else "")))
    return [f"{evaluations:>11}  {distance:>8}  {share:>11}  {words}" for evaluations, distance, share, words in rows]


def _keep(folder: Path, checkpoint: Checkpoint, tuned: Tuned, facts: dict[str, Any]) -> None:
    standard = tuned.chosen["standard"].setting
    changes: dict[str, Any] = {
        "default_steps": standard.steps,
        "default_guidance_scale": standard.guidance_scale,
        "default_sampler": standard.sampler,
        "default_guidance_interval": standard.guidance_interval,
        "default_spacing": standard.spacing,
        "quality": {name: m.entry() for name, m in tuned.chosen.items()},
        "tuning": _account(tuned, facts),
    }
    config = replace(unchanged(folder, checkpoint), **changes)
    files = {TUNING_PLOT: plot(tuned.tried, tuned.finals, tuned.chosen)}
    annotate(folder, card=model_card(config, config.metrics), files=files, **changes)


def _account(tuned: Tuned, facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured and how, for `checkpoint.json`."""
    return {
        **{name: value for name, value in facts.items() if name != "checkpoint"},
        "samples": tuned.tried[0].samples,
        "final_samples": tuned.finals[0].samples,
        "within": {"standard": round(STANDARD - 1, 3), "draft": round(DRAFT - 1, 3)},
        "table": [m.entry() for m in sorted(tuned.measured, key=lambda m: (m.samples, m.evaluations, m.frechet_distance))],
        "minutes": round(sum(m.seconds for m in tuned.measured) / 60, 1),
        "command": command(),
        "hardware": hardware(),
        "commit": commit(),
    }
