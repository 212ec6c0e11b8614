"""What a network that judges pictures says of them: the classifier trained on the data, or Inception."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SPATIAL_CHANNELS = 7  # of a map in the middle of the network, for the spatial Fréchet distance, as in ADM's evaluation


@dataclass(frozen=True)
class Judgement:
    """Of B pictures, float32 on the CPU."""

    features: Tensor  # (B, F)
    spatial: Tensor  # (B, h·w·7): the first channels of a map, channels last
    logits: Tensor  # (B, K)

    @property
    def predicted(self) -> Tensor:
        """(B,) int64."""
        return self.logits.argmax(1)

    def __len__(self) -> int:
        return len(self.features)


class Judge(Protocol):
    def judge(self, images: Tensor) -> Judgement:
        """Pictures (B, C, H, W) uint8, any number of them."""


def joined(parts: Iterable[Judgement]) -> Judgement:
    features, spatial, logits = zip(*((part.features, part.spatial, part.logits) for part in parts), strict=True)
    return Judgement(torch.cat(features), torch.cat(spatial), torch.cat(logits))


def flattened(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) → the first channels (B, h·w·7), channels last, as ADM's reference statistics have them."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
