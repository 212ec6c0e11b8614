"""Finds the first step whose loss or gradient is not a finite number, without waiting for the device at every step."""

import torch
from torch import Tensor

from training.world import World


class Guard:
    """Once a step was bad no update is made until `reset`, so that the weights stay those before it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.reset()

    def reset(self) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=self._world.device)
        self._names: list[str] = []
        self._values = torch.zeros((), device=self._world.device)

    def look(self, step: int, values: dict[str, Tensor]) -> Tensor:
        """Judge a step by its losses and gradient norms, which are scalars; → 1.0 if its update must not be made, else 0.0."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        bad = self._world.largest((~stacked.isfinite().all()).float())
        first = (self._step < 0) & (bad > 0)
        self._values = torch.where(first, stacked, self._values) if self._names else stacked
        self._names = list(values)
        self._step = torch.where(first, step, self._step)
        return (self._step >= 0).float()

    def bad_step(self) -> int | None:
        """The first bad step since the last reset; waits for the device."""
        step = int(self._step)
        return None if step < 0 else step

    def told(self) -> str:
        """What was not finite at the bad step, as far as this process saw it."""
        seen = dict(zip(self._names, self._values.tolist(), strict=True))
        wrong = [f"{name} {value}" for name, value in seen.items() if not torch.tensor(value).isfinite()]
        return ", ".join(wrong) or "on another process"
