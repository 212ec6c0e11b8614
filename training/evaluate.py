"""`dit evaluate CHECKPOINT --data DIR`: how good a checkpoint's pictures are, each measure beside its floor on real images.

The judge is a small classifier trained on the same training images (training/classifier.py); Fréchet distances are in its features.
Real images, reconstructions and pictures all reach it as uint8.
"""

import io
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import Checkpoint, CheckpointConfig, annotate, load, read_config, resolve
from model.sampling import to_pixels
from model.vae import VAE
from training.card import GRID, measures, model_card, settings_line
from training.classifier import Classifier, ClassifierConfig, Judgement, get_classifier, joined
from training.config import DataConfig
from training.data import Dataset, Split, load_dataset, to_float
from training.draw import Drawer, Setting, default_setting
from training.loop import grid
from training.metrics import class_consistency, frechet_distance
from training.runlog import command, commit, hardware

GRID_COLUMNS, GRID_MAX_ROWS = 10, 40
_SEED = 0


def evaluate(
    checkpoint_path: Path,
    data: Path,
    *,
    samples: int = 10_000,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    batch_size: int = 250,
    cache: Path = Path("runs/classifiers"),
    save: bool = True,
    show: Callable[[str], None] = print,
    classifier_config: ClassifierConfig | None = None,
) -> dict[str, Any]:
    """Measure, print the table, and with `save` keep metrics, model card and grid in the checkpoint. Returns the metrics.

    Raises ValueError for settings the checkpoint cannot run, for data of other classes, and for a checkpoint without a VAE.
    """
    began = time.perf_counter()
    folder = resolve(checkpoint_path)  # once, so that a version published meanwhile does not get these metrics
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load(folder, device)
    config = checkpoint.config
    setting = default_setting(config, steps, guidance_scale, sampler)
    setting.table(config)
    require_pictures(config, samples)
    dataset = matching_dataset(config, data)
    _say_if_unbalanced(dataset.test, show)

    classifier = get_classifier(dataset, cache, device, classifier_config)
    show(f"classifier {'from' if classifier.from_cache else 'kept in'} {cache / classifier.key}")
    drawer = Drawer(checkpoint, min(batch_size, samples), compile=False)
    pictures, shown = judge_pictures(drawer, classifier, setting, samples)
    reconstructions = judge_reconstructions(drawer.vae, classifier, dataset.test, batch_size)
    metrics = measure(dataset, classifier, pictures, reconstructions)
    metrics |= {"samples": samples, **setting.entry(), "dtype": drawer.dtype}
    metrics |= {"command": command(), "hardware": hardware(), "commit": commit(), "minutes": round((time.perf_counter() - began) / 60, 1)}
    for line in table(metrics):
        show(line)
    if save:
        _keep(folder, checkpoint, metrics, shown)
        show(f"wrote metrics, README.md and {GRID} to {folder}")
    return metrics


def require_pictures(config: CheckpointConfig, samples: int) -> None:
    """ValueError for a checkpoint that draws none, or for too few of them."""
    if config.vae is None:
        raise ValueError("this checkpoint has no VAE, so its latents cannot become pictures")
    if samples < max(2, len(config.labels)):
        raise ValueError(f"samples must be at least the number of classes, {len(config.labels)}, got {samples}")


def matching_dataset(config: CheckpointConfig, data: Path) -> Dataset:
    """The data at the checkpoint's size and channels. ValueError if its classes are not the checkpoint's, in the same order."""
    names = tuple(group[0] for group in config.labels)
    dataset = load_dataset(data, DataConfig(config.image_size, config.image_channels, labels=names))
    if dataset.class_names != names:
        raise ValueError(f"{data} has the classes {', '.join(dataset.class_names)}; the checkpoint was trained on {', '.join(names)}")
    return dataset


def _say_if_unbalanced(split: Split, show: Callable[[str], None]) -> None:
    counts = split.labels.bincount()
    if counts.max() > 1.1 * counts.min():
        show(
            f"the test classes hold {counts.min()} to {counts.max()} images, the pictures equal shares: the Fréchet distance includes that"
        )


def judge_pictures(drawer: Drawer, classifier: Classifier, setting: Setting, samples: int) -> tuple[Judgement, Tensor]:
    """Draw and judge each batch, and keep only the grid's pictures.

    Returns the judgement of all, and the first pictures of every class that fits the grid, row by row: (rows·columns, H, W, C) uint8.
    """
    classes = len(drawer.checkpoint.labels)
    rows, columns = min(GRID_MAX_ROWS, classes), min(GRID_COLUMNS, samples // classes)
    judged, shown = [], []
    batches = tqdm(drawer.pictures(setting, samples), desc="pictures", unit="batch", total=ceil(samples / drawer.rows), dynamic_ncols=True)
    for labels, seeds, images in batches:
        judged.append(classifier.judge(images.permute(0, 3, 1, 2)))
        shown.append(images[(labels < rows) & (seeds < columns * classes)])
    in_turn = torch.cat(shown).unflatten(0, (columns, rows))  # drawn class after class, so a grid's column at a time
    return joined(judged), in_turn.transpose(0, 1).flatten(0, 1)


@torch.inference_mode()
def judge_reconstructions(vae: VAE, classifier: Classifier, split: Split, batch_size: int) -> Judgement:
    """Real images through the VAE and back, by the posterior's mean: what the pictures could reach if every latent were right."""
    device, judged = vae.latent_mean.device, []
    for images in tqdm(split.batches(batch_size), desc="reconstructions", unit="batch", dynamic_ncols=True):
        decoded = vae.decode(vae.encode(to_float(images.to(device))))
        judged.append(classifier.judge(to_pixels(decoded).permute(0, 3, 1, 2)))
    return joined(judged)


def measure(dataset: Dataset, classifier: Classifier, pictures: Judgement, reconstructions: Judgement) -> dict[str, Any]:
    """Every number of the table. The floor compares as many training images as there are test images, always the same random ones."""
    count = min(len(dataset.train), len(dataset.test))
    chosen = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(_SEED))[:count]
    test = classifier.judge_split(dataset.test).features
    train = classifier.judge_split(dataset.train, chosen).features
    asked = torch.arange(len(pictures.predicted)) % len(dataset.class_names)
    return {
        "class_consistency": class_consistency(pictures.predicted, asked),
        "classifier_accuracy": classifier.test_accuracy,
        "frechet_distance": frechet_distance(pictures.features, test),
        "frechet_distance_reconstructions": frechet_distance(reconstructions.features, test),
        "frechet_distance_train": frechet_distance(train, test),
        "test_images": len(dataset.test),
        "train_images": count,
        "classifier": classifier.key,
    }


def table(metrics: dict[str, Any]) -> list[str]:
    """The lines to print: each measure beside its floor on real images."""
    lines = [("", "measured", "floor on real images"), *measures(metrics)]
    wide, narrow = max(len(line[0]) for line in lines), max(len(line[1]) for line in lines)
    return [
        settings_line(metrics),
        *(f"{what:<{wide}}  {value:>{narrow}}   {floor}" for what, value, floor in lines),
        f"floor of the Fréchet distances: {metrics['train_images']} training images, a fixed random subset, against the test images",
    ]


def unchanged(folder: Path, checkpoint: Checkpoint) -> CheckpointConfig:
    """What the folder says by now: another command may have measured it meanwhile. ValueError if it has other weights."""
    config, found = read_config(folder)
    if found != checkpoint.hash:
        raise ValueError(f"{folder} was replaced by other weights meanwhile; what was measured is not kept in it")
    return config


def _keep(folder: Path, checkpoint: Checkpoint, metrics: dict[str, Any], shown: Tensor) -> None:
    config = unchanged(folder, checkpoint)
    rows = min(GRID_MAX_ROWS, len(config.labels))
    file = io.BytesIO()
    grid(shown, columns=len(shown) // rows, scale=2 if config.image_size <= 64 else 1).save(file, "PNG", optimize=True)
    annotate(folder, metrics=metrics, card=model_card(config, metrics), files={GRID: file.getvalue()})
