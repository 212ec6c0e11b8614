"""Random weights for Inception, the same ones every time: the real ones cannot be had here.

`tests/golden/inception-random.safetensors` holds what torch-fidelity's network makes of them (see tests/golden/README.md).
"""

from functools import cache

import torch
from torch import Tensor

from training.inception import Inception


@cache
def random_weights() -> dict[str, Tensor]:
    """Of a size that keeps activations alive through all layers."""
    generator = torch.Generator().manual_seed(0)
    state = {name: value for name, value in Inception().state_dict().items() if not name.endswith("num_batches_tracked")}
    return {name: _scaled(name, torch.randn(value.shape, generator=generator)) for name, value in sorted(state.items())}


def _scaled(name: str, noise: Tensor) -> Tensor:
    if noise.ndim > 1:
        return noise * (2 / noise[0].numel()) ** 0.5
    if name.endswith("running_var"):
        return (0.1 * noise).exp()
    return 0.1 * noise + (1 if name.endswith("bn.weight") else 0)
