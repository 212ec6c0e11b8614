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


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for q, k and v."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)  # 3 × (B, H, N, D/H)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Linear → GELU (tanh form) → Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
