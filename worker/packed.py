"""Linear layers of a CPU in bfloat16, with weights as oneDNN's kernels want them, and an MLP's GELU inside the product before it.

nn.Linear hands oneDNN a weight by rows, which it brings into its own layout at every call, and copies the bias over the output first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.layers import Mlp

_library = torch.library.Library("dit", "DEF")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, bool gelu) -> Tensor")
_mkldnn: Any = torch.ops.mkldnn


def _run(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    made: Tensor = _mkldnn._linear_pointwise(x, packed, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
    return made


def _shape(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


# An operator of our own, since the compiler takes oneDNN's only with weights that are constants of its graph, which then is not cached.
for _key in ("CPU", "MkldnnCPU"):
    _library.impl("packed_linear", _run, _key)
torch.library.register_fake("dit::packed_linear", _shape, lib=_library)


class PackedLinear(nn.Module):
    """An nn.Linear with the same bits: x (…, in_features) → (…, out_features).

    With `gelu` in its tanh form behind it, taken before the sum is rounded to bfloat16.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, tokens: int, *, gelu: bool = False) -> None:
        """`tokens`: about how many a call has; with others it is right too."""
        super().__init__()
        self.in_features, self.out_features, self.gelu = linear.in_features, linear.out_features, gelu
        self.register_buffer("packed", _mkldnn._reorder_linear_weight(linear.weight.detach(), tokens), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.dit.packed_linear(x, self.packed, self.bias, self.gelu)


def pack_linears(module: nn.Module, tokens: int) -> None:
    """Replace every nn.Linear in it that a CPU runs in bfloat16; their own weights are freed."""
    for name, child in module.named_children():
        if isinstance(child, Mlp) and _can_pack(child.fc1) and _can_pack(child.fc2):
            setattr(module, name, nn.Sequential(PackedLinear(child.fc1, tokens, gelu=True), PackedLinear(child.fc2, tokens)))
        elif not isinstance(child, nn.Linear):
            pack_linears(child, tokens)
        elif _can_pack(child):
            setattr(module, name, PackedLinear(child, tokens))


def _can_pack(linear: nn.Module) -> bool:
    if not isinstance(linear, nn.Linear):
        return False
    weight = linear.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and bool(_mkldnn._is_mkldnn_bf16_supported())
