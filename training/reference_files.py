"""A reference from a file: ADM's statistics of real pictures, real pictures themselves, or both.

ADM's `VIRTUAL_imagenet256_labeled.npz` holds Gaussians of the whole training set, and 10,000 of its pictures for precision and recall.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.inception import FEATURES, SPATIAL
from training.judgement import Judge
from training.metrics import Gaussian, root_of
from training.picture_sets import ARRAY, naming, open_archive, open_pictures
from training.reference import Reference, judge_all, reference_of

_SHAPES = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


def load_reference(path: Path, judge: Judge) -> Reference:
    """A `.npz` with `mu` and `sigma` (and `mu_s`, `sigma_s`), with pictures in `arr_0`, or with both, or a folder of PNGs.

    Statistics that the file has are taken as they are; the rest is measured on its pictures. ValueError if it has neither.
    """
    statistics, with_pictures = _statistics(path)
    gaussian, spatial = _gaussian(statistics, "mu", "sigma"), _gaussian(statistics, "mu_s", "sigma_s")
    if gaussian and not with_pictures:
        return Reference(gaussian, spatial, None)
    there = open_pictures(path)
    judged = judge_all(judge, there.batches(), "reference", there.count)
    measured = reference_of(judged)
    return Reference(gaussian or measured.gaussian, spatial or measured.spatial, judged.features)


def _statistics(path: Path) -> tuple[dict[str, Tensor], bool]:
    """By name, and whether there are pictures."""
    if path.is_dir():
        return {}, True
    with open_archive(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        found = {name: _read(path, archive, name) for name in _SHAPES if name in names}
    for name, values in found.items():
        if tuple(values.shape) != _SHAPES[name] or not torch.isfinite(values).all():
            raise ValueError(f"{name} of {path} has the shape {tuple(values.shape)}; finite numbers of {_SHAPES[name]} are needed")
    return found, ARRAY in names


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(f"{name}.npy") as file, naming(path):
        return torch.from_numpy(np.asarray(np.lib.format.read_array(file, allow_pickle=False), np.float64))


def _gaussian(statistics: dict[str, Tensor], mean: str, covariance: str) -> Gaussian | None:
    there = mean in statistics and covariance in statistics
    return Gaussian(statistics[mean], root_of(statistics[covariance])) if there else None
