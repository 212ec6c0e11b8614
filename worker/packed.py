"""Linear layers of a CPU in bfloat16, with weights as oneDNN's kernels want them.

nn.Linear hands oneDNN a weight by rows, which it brings into its own layout at every call, and copies the bias over the output first.
"""

from typing import Any

import torch
from torch import Tensor, nn

_library = torch.library.Library("dit", "DEF")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
_mkldnn: Any = torch.ops.mkldnn


def _run(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = _mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return made


def _shape(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


# An operator of our own, since the compiler takes oneDNN's only with weights that are constants of its graph, which then is not cached.
for _key in ("CPU", "MkldnnCPU"):
    _library.impl("packed_linear", _run, _key)
torch.library.register_fake("dit::packed_linear", _shape, lib=_library)


class PackedLinear(nn.Module):
    """An nn.Linear with the same bits: x (…, in_features) → (…, out_features)."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, tokens: int) -> None:
        """`tokens`: about how many a call has; with others it is right too."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", _mkldnn._reorder_linear_weight(linear.weight.detach(), tokens), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.dit.packed_linear(x, self.packed, self.bias)


def pack_linears(module: nn.Module, tokens: int) -> None:
    """Replace every nn.Linear in it that a CPU runs in bfloat16; their own weights are freed."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            pack_linears(child, tokens)
        elif child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu" and _mkldnn._is_mkldnn_bf16_supported():
            setattr(module, name, PackedLinear(child, tokens))
