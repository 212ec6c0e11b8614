"""Our measures beside torchmetrics' on the same random features: theirs take a network of one's own, which here passes features through."""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from training.inception_score import inception_score
from training.kernel_distance import kernel_distance
from training.metrics import frechet_distance

pytestmark = pytest.mark.filterwarnings("ignore:Metric `.*` will save all extracted features in buffer")


class Features(nn.Module):
    """Takes features for pictures."""

    num_features = 24

    def forward(self, features: Tensor) -> Tensor:
        return features


def features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator)
    return (torch.randn(count, 24, generator=generator) @ mixing + seed).relu()


def test_frechet_distance_is_theirs() -> None:
    real, generated = features(700, 0), features(500, 1)
    theirs = FrechetInceptionDistance(Features())
    theirs.update(real, real=True)
    theirs.update(generated, real=False)
    assert frechet_distance(real, generated) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_kernel_distance_is_theirs() -> None:
    real, generated = features(300, 0), features(300, 1)
    theirs = KernelInceptionDistance(Features(), subsets=1, subset_size=300)
    theirs.update(real, real=True)
    theirs.update(generated, real=False)
    assert kernel_distance(real, generated, subsets=1, subset_size=300) == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_inception_score_is_theirs() -> None:
    logits = features(500, 2)
    theirs = InceptionScore(Features(), splits=1)
    theirs.update(logits)
    with pytest.warns(UserWarning, match="degrees of freedom"):  # theirs takes a deviation over the splits
        assert inception_score(logits) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
