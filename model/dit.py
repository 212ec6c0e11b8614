"""The Diffusion Transformer: patchify → blocks → final layer (Peebles & Xie 2022, §3.2).

Parameter names are those of the official state dict, so that its checkpoints load without a map.
Shapes: B rows · C latent channels · N tokens · D width · p patch size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
        self.recompute = False  # in training: keep the blocks' inputs only, and compute what is inside again in the backward pass
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

    def conditions(self, t: Tensor, y: Tensor) -> list[Tensor]:
        """What each block, and last the final layer, is told of time t (B,) and class y (B,): nothing in it depends on x."""
        condition = self.condition(t, y)
        if self.config.block not in ADAPTIVE:
            return [condition] * (len(self.blocks) + 1)
        return [layer.adaLN_modulation(condition) for layer in (*self.blocks, self.final_layer)]

    def prepare(self, t: Tensor, y: Tensor) -> Tensor:
        """`conditions` as one row (B, L) of a table, from which `denoise` takes them; each (time, class) need be prepared only once."""
        parts = self.conditions(t, y)
        return torch.cat(parts, dim=1) if self.config.block in ADAPTIVE else parts[0].flatten(1)

    def denoise(self, x: Tensor, prepared: Tensor) -> Tensor:
        """`forward` with what `prepare` made of its time and class."""
        return self._run(x, self._split(prepared))[0]

    def denoise_cached(self, x: Tensor, prepared: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`cached` with what `prepare` made of its time and class."""
        return self._run(x, self._split(prepared), keep=True, change=change)

    def _split(self, prepared: Tensor) -> list[Tensor]:
        if self.config.block in ADAPTIVE:
            return list(prepared.split(self.prepared_sizes, dim=1))
        return [prepared.unflatten(1, (CONTEXT_TOKENS, -1))] * (len(self.blocks) + 1)

    @property
    def prepared_sizes(self) -> list[int]:
        """Numbers per row that `prepare` makes, L in all, by the layer that takes them."""
        if self.config.block not in ADAPTIVE:
            return [CONTEXT_TOKENS * self.config.hidden_size]
        return [layer.adaLN_modulation[1].out_features for layer in (*self.blocks, self.final_layer)]

    @property
    def middle(self) -> range:
        """The blocks that a block cache may leave out: all but the first and the last quarter."""
        ends = -(-len(self.blocks) // 4)
        return range(ends, max(ends, len(self.blocks) - ends))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._run(x, self.conditions(t, y))[0]

    def cached(self, x: Tensor, t: Tensor, y: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`, and by how much the middle blocks changed the tokens (B, N, D). Given the change that they made at an evaluation
        shortly before, they do not run: it is made again (the idea of Ma et al. 2024, DeepCache, on a transformer's residual stream)."""
        return self._run(x, self.conditions(t, y), keep=True, change=change)

    def _run(self, x: Tensor, conditions: list[Tensor], *, keep: bool = False, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """→ output, and the middle's change: what was given, or with `keep` what was made, or else nothing of use."""
        dtype = self.x_embedder.proj.weight.dtype
        h = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)  # (B, N, D)
        in_context = self.config.block == "in-context"
        if in_context:
            h = torch.cat([conditions[0], h], dim=1)  # (B, 2 + N, D)
        middle = self.middle
        h = self._through(range(middle.start), h, conditions)
        if change is None:
            before, h = h, self._through(middle, h, conditions)
            change = h - before if keep else h
        else:
            h = h + change
        h = self._through(range(middle.stop, len(self.blocks)), h, conditions)
        if in_context:
            h = h[:, CONTEXT_TOKENS:]
        return self.unpatchify(self.final_layer(h, conditions[-1])).to(x.dtype), change

    def _through(self, blocks: range, h: Tensor, conditions: list[Tensor]) -> Tensor:
        for i in blocks:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(self.blocks[i], h, conditions[i], self.rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                h = self.blocks[i](h, conditions[i], self.rotary)
        return h

    def unpatchify(self, h: Tensor) -> Tensor:
        """(B, N, p·p·C_out) → (B, C_out, H, W)."""
        p, c = self.config.patch_size, self.config.out_channels
        side = self.config.input_size // p
        h = h.view(h.shape[0], side, side, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(h.shape[0], c, side * p, side * p)
