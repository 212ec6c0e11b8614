"""An exponential moving average of a model's weights, warmed up so that its first values are not the initial ones."""

import copy

import torch
from torch import nn


class EMA:
    """`model` holds the average; it is what is sampled from, evaluated and published."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[torch.Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1 - decay)
