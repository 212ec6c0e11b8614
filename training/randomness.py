"""Every random number of training is a function of the sample it is drawn for: whatever process takes it, in whatever micro-batch, and
whether the run was resumed, a sample's noise is the same. Sample number n is position n mod batch_size of step n div batch_size.
"""

from enum import IntEnum

import torch
from torch import Tensor

from model import noise

SEED = 0  # of the first weights, the order of the data and every draw


class Draw(IntEnum):
    """What a number is for: each has a stream of its own."""

    VIEW = 0  # the picture or its mirror image
    POSTERIOR = 1
    LABEL = 2  # is it dropped?
    TIME = 3
    NOISE = 4


def sample_numbers(step: int, batch_size: int, rows: slice) -> Tensor:
    """Numbers (B,), int64, of the rows of a step's batch."""
    return step * batch_size + torch.arange(batch_size)[rows]


def uniform(numbers: Tensor, draw: Draw) -> Tensor:
    """One number (B,) in (0, 1), ends excluded, float64, for each sample."""
    return noise.uniform(numbers, torch.full_like(numbers, draw))


def normal(numbers: Tensor, draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Standard normals (B, *shape), float32, for each sample."""
    return noise.normal(numbers, torch.full_like(numbers, draw), shape)


def step_generator(seed: int, step: int) -> torch.Generator:
    """For what is trained by one process in whole batches: every random number of a step comes from this."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
