"""The paper's four transformer blocks (Peebles & Xie 2022, §3.2, Fig. 3), and the final layer.

They differ in how the condition enters. Each is called as `block(x, condition, rotary)`:
x (B, N, D) tokens · condition, what its own `adaLN_modulation` made of time and class for the adaptive blocks, (B, 2, D), time and class,
for cross-attention, and unused in context · rotary, a table of 2-D rotary positions or None.
"""

from torch import Tensor, nn

from model.config import ADAPTIVE, DiTConfig
from model.layers import Attention, CrossAttention, Mlp, SwiGLU, make_norm, modulate


def _norm(config: DiTConfig, eps: float, *, affine: bool) -> nn.Module:
    return make_norm(config.hidden_size, rms=config.rms_norm, eps=eps, affine=affine)


def _attention(kind: type[Attention] | type[CrossAttention], config: DiTConfig) -> nn.Module:
    return kind(config.hidden_size, config.num_heads, qk_norm=config.qk_norm, rms_norm=config.rms_norm, eps=config.norm_eps)


def _mlp(config: DiTConfig) -> nn.Module:
    return (SwiGLU if config.swiglu else Mlp)(config.hidden_size, config.mlp_ratio)


class Modulation(nn.Sequential):
    """SiLU → Linear(D, parts·D), named as in the official state dict. The network applies the SiLU, once for all blocks."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    def forward(self, condition: Tensor) -> Tensor:
        """SiLU(t + y) (B, D) → (B, parts·D)."""
        return self[1](condition)


class _Block(nn.Module):
    """What all four have: norm and self-attention, norm and MLP. The norms are affine where no condition supplies scale and shift."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        affine = config.block not in ADAPTIVE
        self.norm1 = _norm(config, config.norm_eps, affine=affine)
        self.attn = _attention(Attention, config)
        self.norm2 = _norm(config, config.mlp_norm_eps, affine=affine)
        self.mlp = _mlp(config)


class AdaLNZeroBlock(_Block):
    """Shift, scale and gate of both halves are regressed from the condition; the gates start at zero, and the block as the identity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.adaLN_modulation = Modulation(config.hidden_size, 6)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = condition.chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a), rotary)
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class AdaLNBlock(_Block):
    """Shift and scale of both norms are regressed from the condition; no gates."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.adaLN_modulation = Modulation(config.hidden_size, 4)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor | None) -> Tensor:
        shift_a, scale_a, shift_m, scale_m = condition.chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_a, scale_a), rotary)
        return x + self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class CrossAttentionBlock(_Block):
    """A plain block whose tokens attend, after themselves, to the sequence [time, class]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.norm_cross = _norm(config, config.norm_eps, affine=True)
        self.cross_attn = _attention(CrossAttention, config)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        x = x + self.cross_attn(self.norm_cross(x), condition)
        return x + self.mlp(self.norm2(x))


class InContextBlock(_Block):
    """A plain ViT block (Dosovitskiy et al. 2021): time and class are two of its tokens."""

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


BLOCKS: dict[str, type[nn.Module]] = {
    "adaln-zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}


class FinalLayer(nn.Module):
    """Norm, then one linear to p·p·C_out values a token; the norm takes shift and scale from the condition if the blocks' norms do."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        adaptive = config.block in ADAPTIVE
        self.norm_final = _norm(config, config.norm_eps, affine=not adaptive)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.hidden_size, 2) if adaptive else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`condition` as for a block: (B, 2D) made by its own `adaLN_modulation`, or unused."""
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = condition.chunk(2, dim=1)
            x = modulate(x, shift, scale)
        return self.linear(x)
