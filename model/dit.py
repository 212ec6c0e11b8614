"""The Diffusion Transformer: patchify → blocks → final layer (Peebles & Xie 2022, §3.2).

Parameter names are those of the official state dict, so that its checkpoints load without a map.
Shapes: B rows · C latent channels · N tokens · D width · p patch size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import BLOCKS, FinalLayer, Modulation
from model.config import ADAPTIVE, DiTConfig
from model.layers import LabelEmbedder, TimestepEmbedder, position_embedding, rotary_table

CONTEXT_TOKENS = 2  # time and class, in the cross-attention and in-context blocks


class PatchEmbed(nn.Module):
    """(B, C, H, W) → (B, N, D) by a convolution whose kernel and stride are the patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.patch_size = p
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch_size
        # The same product as the convolution, written as the linear it is: a gather and one matrix product.
        patches = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class DiT(nn.Module):
    """`dit(x, t, y)`: latents x (B, C, H, W), time t (B,), class y (B,) → (B, 2C, H, W) with learned covariance, else (B, C, H, W)."""

    pos_embed: Tensor
    rotary: Tensor | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(width, config.time_factor, config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.register_buffer("pos_embed", position_embedding(side, width)[None], persistent=False)
        rotary = (
            rotary_table(side, width // config.num_heads, CONTEXT_TOKENS if config.block == "in-context" else 0) if config.rope else None
        )
        self.register_buffer("rotary", rotary, persistent=False)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiT":
        """`.to()`, `.bfloat16()` and the like; the rotary angles keep their float32, of which bfloat16 would leave three digits."""
        rotary = self.rotary
        super()._apply(fn, recurse)
        if rotary is not None and self.rotary is not None:
            self.rotary = rotary.to(self.rotary.device)
        return self

    def reset_parameters(self) -> None:
        """The paper's initialisation: an adaLN-Zero block starts as the identity, and every network predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # the convolution seen as a linear
        nn.init.zeros_(self.x_embedder.get_parameter("proj.bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in ("mlp.0.weight", "mlp.2.weight"):
            nn.init.normal_(self.t_embedder.get_parameter(name), std=0.02)
        for modulation in (module for module in self.modules() if isinstance(module, Modulation)):
            for parameter in modulation.parameters():
                nn.init.zeros_(parameter)
        for parameter in self.final_layer.linear.parameters():
            nn.init.zeros_(parameter)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """What the blocks are told of time t (B,) and class y (B,), made once a forward: SiLU(t + y) (B, D), or [t, y] (B, 2, D)."""
        time, label = self.t_embedder(t), self.y_embedder(y)  # (B, D) each
        if self.config.block in ADAPTIVE:
            return F.silu(time + label)
        return torch.stack([time, label], dim=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtype = self.x_embedder.proj.weight.dtype
        condition = self.condition(t, y)
        h = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)  # (B, N, D)
        in_context = self.config.block == "in-context"
        if in_context:
            h = torch.cat([condition, h], dim=1)  # (B, 2 + N, D)
        for block in self.blocks:
            h = block(h, condition, self.rotary)
        if in_context:
            h = h[:, CONTEXT_TOKENS:]
        return self.unpatchify(self.final_layer(h, condition)).to(x.dtype)

    def unpatchify(self, h: Tensor) -> Tensor:
        """(B, N, p·p·C_out) → (B, C_out, H, W)."""
        p, c = self.config.patch_size, self.config.out_channels
        side = self.config.input_size // p
        h = h.view(h.shape[0], side, side, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(h.shape[0], c, side * p, side * p)
