"""torch.compile for training, where there is a compiler."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.config import Execution
from training.stage import Losses, Stage


def compiled(stage: Stage, execution: Execution, device: torch.device, say: Callable[[str], None]) -> Losses:
    """The stage's losses compiled as a whole; where networks are spread over processes, their parts one by one, in place."""
    if not execution.compile:
        return stage.losses
    problem = _problem(device)
    if problem:
        say(f"nothing is compiled, which is slower: {problem}")
        return stage.losses
    if execution.shard:
        for part in (part for player in stage.players.values() for part in player.parts):
            part.compile(dynamic=False)
        return stage.losses
    if execution.activation_checkpointing:
        torch._dynamo.config.optimize_ddp = False  # it would cut the graph between buckets, and knows no activation checkpointing
    return torch.compile(stage.losses, dynamic=False)


def _problem(device: torch.device) -> str | None:
    """Why nothing can be compiled here, by trying."""

    def twice(x: Tensor) -> Tensor:
        return x + x

    try:
        torch.compile(twice)(torch.ones(4, device=device))
    except Exception as error:  # noqa: BLE001  # whatever a compiler, or its absence, raises
        return str(error).strip().splitlines()[0]
    return None
