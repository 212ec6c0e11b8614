"""Noise as a function of (seed, evaluation, element): the same numbers on every device, in any batch, after any retry.

Philox-4x32-10 (Salmon et al. 2011) counts over elements; Box–Muller turns its words into normals. The logarithm and the angle
are taken in float64 and rounded to float32 at the end, so that differences between mathematics libraries vanish in the rounding.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of counter and two of key, int64 tensors that hold 32 bits and broadcast → four words of 32 random bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The int64 product wraps modulo 2⁶⁴, which keeps all 64 bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(seeds: Tensor, evaluations: Tensor, blocks: int) -> list[Tensor]:
    """Four numbers in (0, 1), ends excluded, of each block: four of (B, blocks), float64."""
    block = torch.arange(blocks, dtype=torch.int64, device=seeds.device)[None, :]
    seed, evaluation = seeds[:, None], evaluations[:, None]
    zero = torch.zeros_like(block)
    words = philox((block, evaluation, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    return [(w.double() + 0.5) * 2.0**-32 for w in words]


def uniform(seeds: Tensor, evaluations: Tensor) -> Tensor:
    """One number (B,) in (0, 1), ends excluded, float64, for seeds (B,) and evaluations (B,), both int64."""
    return _uniform(seeds, evaluations, 1)[0][:, 0]


def normal(seeds: Tensor, evaluations: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals (B, *shape), float32, for seeds (B,) and evaluations (B,), both int64.

    Evaluation 0 is the initial latent, evaluation k + 1 the noise that the sampler adds after the k-th network evaluation.
    """
    elements = math.prod(shape)
    words = _uniform(seeds, evaluations, (elements + 3) // 4)
    pairs = []
    for u, v in (words[:2], words[2:]):
        radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    values = torch.stack(pairs, dim=-1).float()  # (B, blocks, 4)
    return values.flatten(1)[:, :elements].reshape(-1, *shape)
