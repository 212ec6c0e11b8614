"""Where a sampler evaluates the network: n of the times 0 … T−1 of a diffusion, or n points of flow time 1 … 0."""

from collections.abc import Callable
from itertools import accumulate, repeat

import torch
from torch import Tensor

from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion


def paper(objective: ObjectiveConfig, steps: int) -> list[int]:
    """A stride of (T−1)/(n−1), rounded; one step takes t = T−1 (Nichol & Dhariwal 2021, §4, as the official code has it)."""
    if steps == 1:
        return [objective.num_timesteps - 1]
    stride = (objective.num_timesteps - 1) / (steps - 1)
    # Accumulated, as the official code does it: the product would round to another time at some step counts.
    return [round(t) for t in accumulate(repeat(stride, steps - 1), initial=0.0)]


def leading(objective: ObjectiveConfig, steps: int) -> list[int]:
    """Multiples of T//n from 0: what diffusers' DDIM does unless told (Lin et al. 2024, Table 2)."""
    stride = objective.num_timesteps // steps
    return [i * stride for i in range(steps)]


def trailing(objective: ObjectiveConfig, steps: int) -> list[int]:
    """Back from T−1 in strides of T/n, rounded (Lin et al. 2024, Table 2)."""
    count = objective.num_timesteps
    return sorted(round(count - i * count / steps) - 1 for i in range(steps))


def log_snr(objective: ObjectiveConfig, steps: int) -> list[int]:
    """Times nearest to equal distances of log(√ᾱ/√(1−ᾱ)) (Lu et al. 2022, §3.4). Near t = 0 several fall on one time, which counts once."""
    if steps == 1:
        return [objective.num_timesteps - 1]
    alpha_bar = GaussianDiffusion(objective).alpha_bar
    half_log_snr = 0.5 * torch.log(alpha_bar / (1 - alpha_bar))  # falls with t
    wanted = torch.linspace(float(half_log_snr[0]), float(half_log_snr[-1]), steps, dtype=torch.float64)
    return sorted({int((half_log_snr - value).abs().argmin()) for value in wanted})


SPACINGS: dict[str, Callable[[ObjectiveConfig, int], list[int]]] = {
    "paper": paper,
    "leading": leading,
    "trailing": trailing,
    "log-snr": log_snr,
}


def flow_times(steps: int, shift: float = 1.0) -> Tensor:
    """Flow times (n + 1,) from 1 to 0 in equal steps, then shifted towards noise: s·t/(1+(s−1)·t) (Esser et al. 2024, §5.3.2)."""
    t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return shift * t / (1 + (shift - 1) * t)
