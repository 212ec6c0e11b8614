"""Copies of training images are found, and pictures that were never trained on are not taken for copies."""

import pytest
import torch
from torch import Tensor

from training.data import Split
from training.memorisation import find_copies, thumbnails

CPU = torch.device("cpu")


def images(count: int, seed: int, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_pictures_that_copy_training_images_are_counted_and_told() -> None:
    train = Split(images(4100, 0), torch.zeros(4100, dtype=torch.int64))  # more than are read at once
    copied = torch.tensor([7, 3000, 4099])
    noisy = (train.images[copied].int() + torch.randint(-2, 3, (3, 1, 8, 8), generator=torch.Generator().manual_seed(9))).clamp(0, 255)
    pictures = torch.cat([images(27, 1), noisy.to(torch.uint8)])
    found = find_copies(thumbnails(pictures), thumbnails(images(200, 2)), train, CPU)
    assert found.indices[27:, 0].tolist() == copied.tolist()
    assert (found.distances[27:, 0] < 2).all() and (found.distances[:27, 0] > 20).all()
    assert found.limit > 20 and 3 / 30 <= found.near_copies < 6 / 30
    exact = ((train.images[found.indices[0, 0]].float() - pictures[0].float()) ** 2).mean().sqrt()
    assert float(found.distances[0, 0]) == pytest.approx(float(exact), rel=1e-4), "root mean square, in grey levels"


def test_images_of_the_same_law_are_rarely_near_copies() -> None:
    train = Split(images(500, 0), torch.zeros(500, dtype=torch.int64))
    found = find_copies(thumbnails(images(1000, 1)), thumbnails(images(1000, 2)), train, CPU)
    assert found.near_copies < 0.04


def test_large_pictures_are_compared_small() -> None:
    large = images(2, 0, size=64)
    assert thumbnails(large).shape == (2, 32 * 32) and thumbnails(large[:, :, :20, :20]).shape == (2, 400)
    assert torch.equal(thumbnails(large)[:, 0], large[:, 0, :2, :2].float().mean((1, 2)).round().to(torch.uint8))
