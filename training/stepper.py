"""One training step of a stage: forward and backward over micro-batches, clip, guard, update."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.batches import Batch, micro_batches, rows_of
from training.config import Execution
from training.guard import Guard
from training.learner import Learner
from training.stage import Losses
from training.world import World


class _Forward(nn.Module):
    """All networks of a stage and its losses as one module, so that one wrapper sees every gradient, however they are used."""

    def __init__(self, networks: Iterable[nn.Module], losses: Losses) -> None:
        super().__init__()
        self.networks, self.losses = nn.ModuleList(networks), losses

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.losses(batch)


class Stepper:
    """Calling it makes a step of all learners (by name); its `guard` tells whether one was bad."""

    def __init__(self, learners: dict[str, Learner], losses: Losses, world: World, execution: Execution) -> None:
        self.learners, self.guard = learners, Guard(world)
        self._world, self._micro_batch_size = world, execution.micro_batch_size
        self._forward = _replicated(learners, losses, world) if world.size > 1 and not execution.shard else losses
        self._low_precision = next(iter(learners.values())).config.precision == "bfloat16"
        self._losses: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def __call__(self, step: int, batch: Batch) -> None:
        """Train on this process' rows of a step's batch."""
        self._losses, parts = {}, list(micro_batches(batch, self._micro_batch_size))
        for i, part in enumerate(parts):
            with self._synchronised(last=i == len(parts) - 1):
                self._backward(part, rows_of(part) / rows_of(batch))
        self._norms = {_norm_name(i, name): learner.clip() for i, (name, learner) in enumerate(self.learners.items())}
        judged = {learner.loss: self._losses[learner.loss] for learner in self.learners.values()}
        skip = self.guard.look(step, judged | self._norms)
        for learner in self.learners.values():
            learner.update(step, skip)

    def _synchronised(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients travel once, with those of the last micro-batch; where weights are spread they travel each time, to be kept nowhere."""
        return nullcontext() if last or not isinstance(self._forward, DistributedDataParallel) else self._forward.no_sync()

    def _backward(self, part: Batch, share: float) -> None:
        with torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._low_precision):
            losses = self._forward(part)
        total = torch.stack([losses[learner.loss] for learner in self.learners.values()]).sum()
        (total * share).backward()
        for name, value in losses.items():
            value = value.detach().float() * share
            self._losses[name] = self._losses[name] + value if name in self._losses else value

    def values(self) -> dict[str, float]:
        """Of the last step: losses, means over the whole batch, and gradient norms. All processes must ask; waits for the device."""
        means = self._world.sum(torch.stack(list(self._losses.values())) / self._world.size)
        return dict(zip(self._losses, means.tolist(), strict=True)) | {name: float(norm) for name, norm in self._norms.items()}


def _norm_name(number: int, name: str) -> str:
    return f"{name}_gradient_norm" if number else "gradient_norm"


def _replicated(learners: dict[str, Learner], losses: Losses, world: World) -> DistributedDataParallel:
    module = _Forward((learner.network for learner in learners.values()), losses)
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True)
