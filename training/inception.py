"""The Inception-v3 of FID, as TensorFlow's graph of 2015-12-05 has it (Szegedy et al. 2015), under the names of torch-fidelity's weights.

Where it differs from other Inceptions: averages at a border count only what is inside, the last block takes a maximum where the block
before it averages, pictures are resized without half-pixel centres, and there are 1008 classes. Shapes: B pictures.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.judgement import SPATIAL_CHANNELS, Judgement, flattened, joined

SIZE = 299  # pixels
FEATURES, SPATIAL, CLASSES = 2048, 17 * 17 * SPATIAL_CHANNELS, 1008
_BATCH = 50


class Step(NamedTuple):
    """A convolution of a branch."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)


Branch = tuple[Step | tuple[Step, Step], ...]  # one after the other; two of a pair stand side by side


class Convolution(nn.Module):
    """Convolution, norm, ReLU. `padded`: a stride of 1 keeps the size."""

    def __init__(self, channels_in: int, channels: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.ModuleDict):
    """Branches over one map, joined along the channels; the last is a pool, with a convolution if it has channels of its own.

    With `halve` the last step of each branch has a stride of 2 and no padding.
    """

    def __init__(self, channels_in: int, branches: tuple[Branch, ...], *, pool: int = 0, take_maximum: bool = False, halve: bool = False):
        super().__init__()
        self.take_maximum, self.halve = take_maximum, halve
        self.chains: list[list[list[str]]] = []
        for branch in branches:
            chain, channels = list[list[str]](), channels_in
            for place in branch:
                steps = (place,) if isinstance(place, Step) else place
                last = halve and place is branch[-1]
                for step in steps:
                    self[step.name] = Convolution(channels, step.channels, step.kernel, 2 if last else 1, padded=not last)
                chain.append([step.name for step in steps])
                channels = steps[0].channels
            self.chains.append(chain)
        if pool:
            self["branch_pool"] = Convolution(channels_in, pool, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self._run(chain, x) for chain in self.chains), self._pooled(x)], 1)

    def _run(self, chain: list[list[str]], x: Tensor) -> Tensor:
        for names in chain:
            x = torch.cat([self[name](x) for name in names], 1)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        if self.halve:
            return F.max_pool2d(x, 3, stride=2)
        if self.take_maximum:
            return self["branch_pool"](F.max_pool2d(x, 3, stride=1, padding=1))
        return self["branch_pool"](F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _at_35(channels_in: int, pool: int) -> Mixed:
    fives = Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5))
    return Mixed(channels_in, ((Step("branch1x1", 64),), fives, _threes(96)), pool=pool)


def _threes(last: int) -> Branch:
    return Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3)), Step("branch3x3dbl_3", last, (3, 3))


def _at_17(inner: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    once = Step("branch7x7_1", inner), Step("branch7x7_2", inner, across), Step("branch7x7_3", 192, down)
    names = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    twice = tuple(map(Step, names, (inner, inner, inner, inner, 192), ((1, 1), down, across, down, across)))
    return Mixed(768, ((Step("branch1x1", 192),), once, twice), pool=192)


def _to_8() -> Mixed:
    threes = Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3))
    names = [f"branch7x7x3_{i}" for i in range(1, 5)]
    sevens = tuple(Step(name, 192, kernel) for name, kernel in zip(names, ((1, 1), (1, 7), (7, 1), (3, 3)), strict=True))
    return Mixed(768, (threes, sevens), halve=True)


def _at_8(channels_in: int, *, take_maximum: bool) -> Mixed:
    def both(name: str) -> tuple[Step, Step]:
        return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))

    once = Step("branch3x3_1", 384), both("branch3x3_2")
    twice = Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, (3, 3)), both("branch3x3dbl_3")
    return Mixed(channels_in, ((Step("branch1x1", 320),), once, twice), pool=192, take_maximum=take_maximum)


class Inception(nn.Module):
    """A judge; its weights: training/inception_weights.py."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _at_35(192, pool=32), _at_35(256, pool=64), _at_35(288, pool=64)
        self.Mixed_6a = Mixed(288, ((Step("branch3x3", 384, (3, 3)),), _threes(96)), halve=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _at_17(128), _at_17(160), _at_17(160), _at_17(192)
        self.Mixed_7a = _to_8()
        self.Mixed_7b, self.Mixed_7c = _at_8(1280, take_maximum=False), _at_8(2048, take_maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, H, W) uint8 → features (B, 2048), spatial (B, 17·17·7), logits without their bias (B, 1008).

        The spatial ones are of `mixed_6/conv` in the graph, which is Mixed_6d's first branch here: the first of its channels.
        """
        x = (resize(images.float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (B, 288, 35, 35)
        middle = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(middle))))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, flattened(middle), features @ self.fc.weight.T  # the Inception Score leaves the bias out

    @torch.inference_mode()
    def judge(self, images: Tensor) -> Judgement:
        """Pictures (B, C, H, W) uint8, grey or RGB. ValueError for another type, which would be another pixel form."""
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception takes uint8 pictures, got {images.dtype}")
        device = self.fc.weight.device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # ten bits of mantissa would move a feature by a thousandth
            found = [self(part.to(device).expand(-1, 3, -1, -1)) for part in images.split(_BATCH)]
        return joined(Judgement(*(value.cpu() for value in part)) for part in found)


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel i is taken at i·H/size, so the corners do not match. (B, C, H, W) → (B, C, size, size)."""
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=images.dtype, device=images.device) * (length / size)
        low = position.long()
        weight = (position - low).view([size if d == dim else 1 for d in range(4)])
        pair = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = torch.lerp(*pair, weight)
    return images
