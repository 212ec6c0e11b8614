"""Embeddings, attention and modulation.

Shapes: B rows · N tokens · D width · H heads · C channels · p patch size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, with shift and scale (B, D) spread over the tokens of x (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def position_embedding(size: int, width: int) -> Tensor:
    """Frozen 2-D sine-cosine table (size², width): column position in the first half of the channels, row in the second."""
    # On the CPU by name: the table is not stored, so it must be a real one also in a network built on the meta device.
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angle = torch.arange(size, dtype=torch.float64, device="cpu")[:, None] * frequency  # (size, width/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (size, width/2)
    column = axis[None, :, :].expand(size, size, -1)
    row = axis[:, None, :].expand(size, size, -1)
    return torch.cat([column, row], dim=2).reshape(size * size, width).float()


class TimestepEmbedder(nn.Module):
    """t (B,) → 256 features, cosine then sine → Linear–SiLU–Linear → (B, D)."""

    FEATURES = 256

    def __init__(self, width: int, time_factor: float, frequency_shift: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.time_factor, self.frequency_shift = time_factor, frequency_shift

    def features(self, t: Tensor) -> Tensor:
        """Float32 whatever the weights are: bf16 cannot tell t = 997 from t = 999."""
        half = self.FEATURES // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(10000.0) * index / (half - self.frequency_shift))
        angle = (t.float() * self.time_factor)[:, None] * frequency  # (B, 128)
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """Class y (B,) → (B, D); the last row of the table is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class RMSNorm(nn.RMSNorm):
    """In its weight's type: a bf16 input and a float32 weight, as autocast pairs them, have no fused kernel, and torch warns of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


def make_norm(width: int, *, rms: bool, eps: float, affine: bool) -> nn.Module:
    """Layer norm, or root-mean-square norm; affine where no condition supplies scale and shift."""
    kind = RMSNorm if rms else nn.LayerNorm
    return kind(width, eps=eps, elementwise_affine=affine)


def rotary_table(size: int, head_width: int, prefix: int = 0) -> Tensor:
    """Cosine and sine of 2-D rotary angles (2, prefix + size², head width): columns turn one half of the pairs, rows the other.

    Su et al. 2021, §3. Channel i is paired with i + half the head's width. The first `prefix` tokens, which have no place, are not turned.
    """
    quarter = head_width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angle = torch.arange(size, dtype=torch.float64, device="cpu")[:, None] * frequency  # (size, quarter)
    column = angle[None, :, :].expand(size, size, -1)
    row = angle[:, None, :].expand(size, size, -1)
    pairs = torch.cat([column, row], dim=2).reshape(size * size, 2 * quarter)
    pairs = torch.cat([torch.zeros(prefix, 2 * quarter, dtype=torch.float64, device="cpu"), pairs])
    return torch.stack([pairs.cos(), pairs.sin()]).repeat(1, 1, 2).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, H, N, D/H) turned by the angles of `table` (2, N, D/H), in float32: bf16 would cost the angles all but three digits."""
    cosine, sine = table.float()
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cosine + torch.cat([-b, a], dim=-1) * sine).to(x.dtype)


_TINY, _SHORT = range(2, 64), range(64, 513)  # tokens


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over the tokens of q, k, v (B, H, N, d).

    Compiled in bfloat16 on the CPU it is written out for sequences for which torch's fused kernel is slow. Short ones: it took 17 ms where
    two products and a compiled softmax took 9 (8 rows, 12 heads, 256 tokens); from 1024 tokens on the fused kernel wins. The price is that
    scores are rounded to bfloat16, as torch's unfused attention does: 0.4 % of the result at scores of spread 1, 1.3 % at 8, where the
    fused kernel has 0.2 %. Tiny ones, whose products cost little in any type, are written out in float32: 0.16 ms where the fused kernel
    took 0.35 (32 rows, 4 heads, 16 tokens).
    """
    if torch.compiler.is_compiling() and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        if k.shape[2] in _TINY and q.shape[2] in _TINY:
            scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
            return (torch.softmax(scores, dim=-1) @ v.float()).to(v.dtype)
        if k.shape[2] in _SHORT:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for q, k and v; q and k normalised per head (Dehghani et al. 2023) where asked."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False, rms_norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = make_norm(width // num_heads, rms=rms_norm, eps=eps, affine=True) if qk_norm else nn.Identity()
        self.k_norm = make_norm(width // num_heads, rms=rms_norm, eps=eps, affine=True) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens x (B, N, D) to a context (B, M, D)."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False, rms_norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = make_norm(width // num_heads, rms=rms_norm, eps=eps, affine=True) if qk_norm else nn.Identity()
        self.k_norm = make_norm(width // num_heads, rms=rms_norm, eps=eps, affine=True) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, d = x.shape
        heads = (self.num_heads, d // self.num_heads)
        q = self.q(x).view(b, n, *heads).transpose(1, 2)  # (B, H, N, D/H)
        k, v = self.kv(context).view(b, context.shape[1], 2, *heads).permute(2, 0, 3, 1, 4)  # 2 × (B, H, M, D/H)
        x = attend(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as the official code has it.

    Compiled, ½(1 + tanh u) is written as the logistic function of 2u, which it equals: vectorised on the CPU that is three times as fast.
    """
    if torch.compiler.is_compiling():
        wide = x.float()
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    """Linear → GELU (tanh form) → Linear."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Linear → SiLU(gate)·value → Linear (Shazeer 2020); two thirds of the hidden width, so that it has as many parameters as `Mlp`."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = -(-int(width * ratio * 2 / 3) // 8) * 8  # a multiple of 8, which matrix kernels like
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)
