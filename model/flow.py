"""Rectified flow: the linear path and its loss (Liu et al. 2022; logit-normal time of Esser et al. 2024, §3.1).

Time runs from 1 (noise) to 0 (clean): x_t = (1−t)·x₀ + t·ε, and the network predicts the velocity dx/dt = ε − x₀.
"""

import torch
from torch import Tensor

from model.config import ObjectiveConfig


class RectifiedFlow:
    """The path between data and noise, and the training loss."""

    def __init__(self, config: ObjectiveConfig) -> None:
        if config.kind != "flow":
            raise ValueError(f"rectified flow needs the objective 'flow', got {config.kind!r}")
        self.config = config

    def times(self, uniform: Tensor) -> Tensor:
        """Training times (B,), float32, uniform or logit-normal, by their quantiles at uniform numbers (B,) in (0, 1), float64."""
        if self.config.flow_time == "uniform":
            return uniform.float()
        normal = torch.special.ndtri(uniform)
        return torch.sigmoid(self.config.logit_normal_mean + self.config.logit_normal_std * normal).float()

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * noise

    def losses(self, out: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Mean squared error of the velocity per row (B,), called as that of the diffusion; the velocity is the same all along the path."""
        mse = (out - (noise - x0)).square().flatten(1).mean(1)
        return {"mse": mse, "loss": mse}
