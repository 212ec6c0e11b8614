"""The paper's measures: FID, sFID, IS, KID, precision and recall in Inception's features, as ADM's evaluation takes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.inception import Inception
from training.inception_weights import FILE, RELEASE, load_inception
from training.judgement import Judgement
from training.picture_sets import open_pictures
from training.reference import Reference, judge_all
from training.reference_files import load_reference

INCEPTION = "inception"  # the judge's name, and where a checkpoint's metrics say how its numbers were taken
NAMES = {
    "frechet_distance": "fid",
    "spatial_frechet_distance": "sfid",
    "inception_score": "inception_score",
    "kernel_distance": "kid",
    "precision": "inception_precision",
    "recall": "inception_recall",
}


@dataclass(frozen=True)
class InceptionJudge:
    """The network with its weights, and what is compared with."""

    network: Inception
    reference: Reference
    told: dict[str, Any]  # what is recorded beside the numbers

    def measures(self, pictures: Judgement) -> dict[str, Any]:
        """The numbers by the names that they have in a checkpoint's metrics."""
        return {NAMES[name]: value for name, value in self.reference.compare(pictures).items()}


def open_inception(weights: Path | None, reference: Path | None, device: torch.device) -> InceptionJudge:
    """Weights first, since a reference may hold pictures to judge. ValueError says what is missing or wrong."""
    if weights is None:
        raise ValueError(f"--inception is missing: the file {FILE}, from {RELEASE}")
    if reference is None:
        raise ValueError("--reference is missing: a .npz with ADM's statistics or real pictures, or a folder of PNGs")
    network = load_inception(weights, device)
    found = load_reference(reference, network)
    pictures = 0 if found.features is None else len(found.features)
    return InceptionJudge(network, found, {"weights": FILE, "reference": reference.name, "reference_pictures": pictures})


def evaluate_pictures(path: Path, reference: Path | None, weights: Path | None) -> dict[str, Any]:
    """Pictures of any model, a `.npz` or a folder of PNGs, against a reference. ValueError for what cannot be read."""
    there = open_pictures(path)
    judge = open_inception(weights, reference, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    judged = judge_all(judge.network, there.batches(), "pictures", there.count)
    return {**judge.measures(judged), INCEPTION: {"samples": there.count, "pictures": path.name, **judge.told}}
