"""The measures in the features of the classifier trained on the data: pictures against the test images, each beside its floor.

The floor is as many training images of each class as there are pictures, a fixed random choice: what a perfect model would reach. Between
the two are the VAE's reconstructions of the test images: what the pictures could reach if every latent were right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import Checkpoint, CheckpointConfig
from model.sampling import to_pixels
from model.vae import VAE
from training.classifier import Classifier, ClassifierConfig, get_classifier
from training.config import DataConfig
from training.data import Dataset, Split, load_dataset, to_float
from training.drawn import Drawn
from training.judgement import Judgement, joined
from training.memorisation import Memorisation, find_copies, thumbnails
from training.metrics import class_consistency
from training.neighbours import NEIGHBOURS
from training.reference import Reference, reference_of

LOCAL = "classifier"  # the judge's name
_SEED = 0


@dataclass(frozen=True)
class Local:
    """What was found."""

    metrics: dict[str, Any]
    memorisation: Memorisation
    dataset: Dataset


@dataclass(frozen=True)
class LocalJudge:
    classifier: Classifier
    dataset: Dataset

    def measure(self, vae: VAE, drawn: Drawn, batch_size: int) -> Local:
        """Every number of the table. Random choices are always the same ones."""
        metrics, memorisation = _measure(self.dataset, self.classifier, vae, drawn, batch_size)
        return Local(metrics, memorisation, self.dataset)


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


def open_local(
    checkpoint: Checkpoint, data: Path, cache: Path, classifier_config: ClassifierConfig | None, show: Callable[[str], None]
) -> LocalJudge:
    """The classifier of this data, from the cache or trained now. ValueError for data that does not fit the checkpoint."""
    dataset = matching_dataset(checkpoint.config, data)
    if len(dataset.test) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} test images, and {data} has {len(dataset.test)}")
    _say_if_unbalanced(dataset.test, show)
    classifier = get_classifier(dataset, cache, checkpoint.device, classifier_config)
    show(f"classifier {'from' if classifier.from_cache else 'kept in'} {cache / classifier.key}")
    return LocalJudge(classifier, dataset)


def _say_if_unbalanced(split: Split, show: Callable[[str], None]) -> None:
    counts = split.labels.bincount()
    if counts.max() > 1.1 * counts.min():
        show(
            f"the test classes hold {counts.min()} to {counts.max()} images, the pictures about equal shares: every distance includes that"
        )


def _measure(dataset: Dataset, classifier: Classifier, vae: VAE, drawn: Drawn, batch_size: int) -> tuple[dict[str, Any], Memorisation]:
    pictures = drawn.judged[LOCAL]
    chosen = rows_like(dataset.train.labels, drawn.labels)
    test, train = classifier.judge_split(dataset.test), classifier.judge_split(dataset.train, chosen)
    reconstructions, small = _reconstructions(vae, classifier, dataset.test, batch_size)
    memorisation = find_copies(drawn.thumbnails, small, dataset.train, vae.latent_mean.device)
    reference = reference_of(test)
    metrics = {
        **_measures(reference, pictures, ""),
        **_measures(reference, _shuffled(reconstructions), "_reconstructions"),
        **_measures(reference, train, "_train"),
        "class_consistency": class_consistency(pictures.predicted, drawn.labels),
        "class_consistency_reconstructions": class_consistency(reconstructions.predicted, dataset.test.labels),
        "classifier_accuracy": classifier.test_accuracy,
        "class_consistencies": _by_class(pictures.predicted, drawn.labels, len(dataset.class_names)),
        "class_accuracies": _by_class(test.predicted, dataset.test.labels, len(dataset.class_names)),
        "near_copies": memorisation.near_copies,
        "test_images": len(dataset.test),
        "train_images": len(chosen),
        "classifier": classifier.key,
    }
    return metrics, memorisation


def rows_like(labels: Tensor, asked: Tensor) -> Tensor:
    """Rows of `labels` (M,), as many of each class as in `asked` (N,) or all that there are: always the same ones, in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SEED))
    rank = torch.empty_like(order)  # of a row among those of its class
    for label in range(int(labels.max()) + 1):
        of_class = order[labels[order] == label]
        rank[of_class] = torch.arange(len(of_class))
    wanted = asked.bincount(minlength=int(labels.max()) + 1)
    return order[rank[order] < wanted[labels[order]]]


def _measures(reference: Reference, judged: Judgement, suffix: str) -> dict[str, float]:
    names = {"inception_score": "classifier_score"}  # the formula is the same, the network is not
    return {names.get(name, name) + suffix: value for name, value in reference.compare(judged).items()}


def _shuffled(judged: Judgement) -> Judgement:
    """A folder's images come class by class; a split of the score must hold all of them."""
    order = torch.randperm(len(judged), generator=torch.Generator().manual_seed(_SEED))
    return Judgement(judged.features[order], judged.spatial[order], judged.logits[order])


def _by_class(predicted: Tensor, asked: Tensor, classes: int) -> list[float | None]:
    """Class consistency of each class; None of one that has no picture."""
    right, all_of = asked[predicted == asked].bincount(minlength=classes), asked.bincount(minlength=classes)
    return [round(float(r) / float(n), 4) if n else None for r, n in zip(right, all_of, strict=True)]


def _reconstructions(vae: VAE, classifier: Classifier, split: Split, batch_size: int) -> tuple[Judgement, Tensor]:
    """Judged, and as thumbnails (M, P)."""
    judged, small = [], []
    for images in tqdm(_decoded(vae, split, batch_size), desc="reconstructions", unit="batch", dynamic_ncols=True):
        judged.append(classifier.judge(images))
        small.append(thumbnails(images))
    return joined(judged), torch.cat(small)


@torch.inference_mode()
def _decoded(vae: VAE, split: Split, batch_size: int) -> Iterator[Tensor]:
    """Real images (B, C, H, W) through the VAE and back, by the posterior's mean, on the CPU."""
    for images in split.batches(batch_size):
        yield to_pixels(vae.decode(vae.encode(to_float(images.to(vae.latent_mean.device))))).permute(0, 3, 1, 2).cpu()
