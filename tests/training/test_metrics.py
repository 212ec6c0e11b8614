"""Fréchet distance and class consistency against what is known in closed form."""

import pytest
import torch
from torch import Tensor

from training.metrics import Gaussian, class_consistency, fit_gaussian, frechet_distance, gaussian_distance, root_of


def with_moments(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Features (count, F) whose sample mean and sample covariance are exactly these."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centred = raw - raw.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.T))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def random_covariance(size: int, seed: int) -> Tensor:
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    cov_a = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    cov_b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)  # does not commute with cov_a
    product = cov_a @ cov_b
    root_trace = (product.trace() + 2 * product.det().sqrt()).sqrt()  # of a 2×2 matrix: tr √M = √(tr M + 2√det M)
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    found = frechet_distance(with_moments(mean_a, cov_a, 100, seed=0), with_moments(mean_b, cov_b, 333, seed=1))
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_of_diagonal_gaussians_compares_standard_deviations() -> None:
    mean = torch.arange(5, dtype=torch.float64)
    std_a, std_b = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 2, 1, 0, 7]).double()
    found = gaussian_distance(Gaussian(mean, std_a.diag()), Gaussian(mean + 1, root_of((std_b**2).diag())))
    assert found == pytest.approx(5 + float((std_a - std_b).square().sum()), rel=1e-12)


def test_frechet_distance_is_zero_for_identical_sets_and_symmetric() -> None:
    a = with_moments(torch.zeros(16).double(), random_covariance(16, seed=3), 200, seed=4).float()
    b = a.flip(0) * 1.5 + 0.25
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_is_sound_when_features_are_dead_or_fewer_pictures_than_features() -> None:
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(5))  # rank 9 of 64
    features[:, 20:] = 0
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(64 * 4, rel=1e-6)


def test_a_root_gives_its_covariance_back_whether_pictures_or_features_are_more() -> None:
    matrix = random_covariance(12, seed=6)
    root = root_of(matrix)
    assert torch.allclose(root @ root.T, matrix, rtol=1e-10, atol=1e-12)
    for count in (5, 12, 13, 50):
        features = torch.randn(count, 12, generator=torch.Generator().manual_seed(count))
        root = fit_gaussian(features).root
        assert torch.allclose(root @ root.T, torch.cov(features.T.double()), rtol=1e-10, atol=1e-12)


def test_one_picture_or_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        fit_gaussian(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        fit_gaussian(torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(torch.randn(5, 3), torch.randn(5, 4))


def test_class_consistency_is_the_share_of_asked_for_classes() -> None:
    assert class_consistency(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(ValueError, match="predicted classes for"):
        class_consistency(torch.tensor([0, 1, 2]), torch.tensor([0, 1]))
