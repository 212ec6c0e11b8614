"""Exponential moving averages of a model's weights, warmed up so that their first values are not the initial ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is spread over many, else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """`averages[decay]` are the averages of `parameters`, in their order, for each of several decays."""

    def __init__(self, parameters: Sequence[Tensor], decays: Sequence[float]) -> None:
        self.parameters = [p.detach() for p in parameters]
        self.averages = {decay: [p.clone() for p in self.parameters] for decay in decays}
        self._trained = [local(p) for p in self.parameters] * len(decays)
        self._averaged = [local(a) for averages in self.averages.values() for a in averages]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """All averages in one pass."""
        if not self._averaged:
            return
        warm = (1 + step) / (10 + step)
        weights = [1 - min(decay, warm) for decay in self.averages for _ in self.parameters]
        torch._foreach_lerp_(self._averaged, self._trained, weights)

    @contextmanager
    def applied(self, decay: float) -> Iterator[None]:
        """Inside, the model's weights are the averages: nothing is held twice, also where no process holds the whole model."""
        self._exchange(decay)
        try:
            yield
        finally:
            self._exchange(decay)

    @torch.no_grad()
    def _exchange(self, decay: float) -> None:
        for parameter, average in zip(self.parameters, self.averages[decay], strict=True):
            kept = local(parameter).clone()
            local(parameter).copy_(local(average))
            local(average).copy_(kept)
