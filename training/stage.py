"""What is trained: networks, each with an optimiser of its own, and the losses of a batch that they share."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from training.batches import Batch
from training.config import OptimiserConfig

Losses = Callable[[Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class Player:
    """A network with an optimiser of its own, which makes one of its stage's losses small."""

    network: nn.Module
    config: OptimiserConfig
    loss: str = "loss"
    parts: Sequence[nn.Module] = ()  # of the network, inner before outer: spread over the processes one by one, where it is


@dataclass(frozen=True)
class Stage:
    """The first of the players is the one that is previewed and returned; its configuration says how many steps of which batch.

    A stage's losses are differentiated as one sum: one that uses another player's network must hold that one's weights fixed
    (`torch.func.functional_call` with detached parameters).
    """

    title: str
    players: Mapping[str, Player]
    batch_at: Callable[[int, slice], Batch]  # those rows of a step's batch, on the CPU; called in threads, for steps to come
    losses: Losses  # of rows on the device: scalars, each a mean over the rows
    preview: Callable[[nn.Module], Image.Image]
    made_of: dict[str, Any]  # what else must be the same for a run to be resumed: architecture and objective

    @property
    def main(self) -> Player:
        return next(iter(self.players.values()))

    def identity(self) -> dict[str, Any]:
        """What makes a run this run and no other, as JSON gives it back."""
        others = [(name, player) for name, player in self.players.items() if player is not self.main]
        settings = {f"{name}.{field}": value for name, player in others for field, value in asdict(player.config).items()}
        return json.loads(json.dumps({**asdict(self.main.config), **settings, **self.made_of}))
