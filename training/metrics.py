"""Fréchet distance and class consistency, as functions of features and classes. Linear algebra in float64 on the CPU.

Other measures of `dit evaluate`: training/inception_score.py, kernel_distance.py, neighbours.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 4096  # converted to float64 at once: 50,000 pictures' features stay in float32


@dataclass(frozen=True)
class Gaussian:
    """What a Fréchet distance knows of a set of pictures."""

    mean: Tensor  # (F,) float64
    root: Tensor  # (F, R) float64: root·rootᵀ is the covariance


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance of features (N, F). ValueError for fewer than two pictures or values that are not finite."""
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"a covariance needs features (N, F) of at least 2 pictures, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("the features hold values that are not finite")
    count, parts = len(features), features.detach().cpu().split(_ROWS)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
    if count <= len(mean):  # the centred features are a root already
        return Gaussian(mean, (features.detach().cpu().double() - mean).T / (count - 1) ** 0.5)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
    return Gaussian(mean, root_of(covariance))


def root_of(covariance: Tensor) -> Tensor:
    """R with R·Rᵀ = a symmetric positive semi-definite matrix (F, F); rounding's small negative eigenvalues count as zero."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt()


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    The trace of (Σ_a Σ_b)^½ is the sum of the singular values of R_aᵀ·R_b, whatever roots of the covariances: no root of a matrix that is
    not symmetric, and exact to rounding for singular covariances, where the root of an eigenvalue 1e-16 would already be 1e-8.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions cannot be compared")
    overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return max(0.0, float(distance))  # rounding may leave −1e-15 for equal sets


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features (N, F) and (M, F), each seen as a Gaussian."""
    return gaussian_distance(fit_gaussian(features_a), fit_gaussian(features_b))


def class_consistency(predicted: Tensor, asked: Tensor) -> float:
    """Share of pictures, in 0…1, whose predicted class (N,) is the one that was asked for (N,)."""
    if predicted.shape != asked.shape or predicted.numel() == 0:
        raise ValueError(f"{tuple(predicted.shape)} predicted classes for {tuple(asked.shape)} asked for: the same number, at least one")
    return float((predicted.cpu() == asked.cpu()).double().mean())
