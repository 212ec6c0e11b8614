"""A player at work: its optimiser, its averages, and everything about it that a resumed run needs."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from training.config import OptimiserConfig
from training.ema import EMA, local
from training.stage import Player
from training.world import World


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2


def build_optimiser(parameters: list[nn.Parameter], config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW in one kernel, with its state made at once, so that a saved one can be read into it."""
    optimiser = torch.optim.AdamW(parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True)
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimiser.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimiser


class Learner:
    """With `shard` the player's network is spread over the world's processes (FSDP2)."""

    def __init__(self, player: Player, world: World, *, shard: bool) -> None:
        self.network, self.config, self.loss = player.network, player.config, player.loss
        self._world, self._shell = world, _without_weights(self.network) if shard else None
        if shard:
            _shard(player, world)
        # Taken once: while a spread network computes, its modules hold other tensors.
        self._named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self._buffers = dict(self.network.named_buffers())
        self._parameters = list(self._named.values())
        self.optimiser = build_optimiser(self._parameters, self.config)
        self.ema = EMA(self._parameters, self.config.ema_decays)

    def clip(self) -> Tensor:
        """Scale the gradient to at most the configured norm; → the norm it had, which is not waited for."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, step: int, skip: Tensor) -> None:
        """One step of the optimiser and of the averages; where `skip` is 1.0 the weights stay, and the averages move towards them."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimiser.grad_scale, self.optimiser.found_inf = None, skip  # type: ignore[attr-defined]  # read by the fused kernel
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(step)

    def is_finite(self) -> bool:
        """Whether all weights are, of those that this process holds; waits for the device."""
        return all(bool(local(p).isfinite().all()) for p in self._parameters)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and the optimiser's state by name: what is saved, and what a saved state is read into."""
        found = {f"network.{name}": p.detach() for name, p in self._named.items()}
        found |= {f"buffer.{name}": buffer for name, buffer in self._buffers.items()}
        for decay, averages in self.ema.averages.items():
            found |= {f"average-{decay}.{name}": average for name, average in zip(self._named, averages, strict=True)}
        for name, p in self._named.items():
            found |= {f"optimiser.{key}.{name}": value for key, value in self.optimiser.state[p].items()}
        return found

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """The network with its first average for weights, to be looked at."""
        decay = next(iter(self.ema.averages), None)
        with self.ema.applied(decay) if decay is not None else nullcontext():
            self.network.eval()
            yield self.network
            self.network.train()

    @torch.no_grad()
    def finished(self, decay: float | None) -> nn.Module:
        """The network with the averages of `decay`, or for None as trained. One that was spread is whole on the first process alone."""
        weights = self._parameters if decay is None else self.ema.averages[decay]
        if self._shell is None:
            for p, weight in zip(self._parameters, weights, strict=True):
                p.copy_(weight)
            return self.network.eval().requires_grad_(False)
        state = dict(zip(self._named, (self._gathered(weight) for weight in weights), strict=True))
        self._shell.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=False, assign=True)
        return self._shell.eval().requires_grad_(False)

    def _gathered(self, weight: Tensor) -> Tensor | None:
        assert isinstance(weight, DTensor)
        full = weight.full_tensor()  # all processes must take part
        return full.cpu() if self._world.first else None


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory."""
    return copy.deepcopy(network, {id(p): nn.Parameter(p.detach().to("meta")) for p in network.parameters()})


def _shard(player: Player, world: World) -> None:
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (*player.parts, player.network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
