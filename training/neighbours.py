"""Nearest neighbours among many points: improved precision and recall, and which candidates are nearest.

Distances are squared and come in blocks of rows, so that 50,000 points against 50,000 need no more memory than a block.
Shapes: N, M points · F their coordinates.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

NEIGHBOURS = 3  # of precision and recall, as in the paper and in ADM's evaluation
_BLOCK = 2**25  # distances at once: 128 MiB


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of `generated` (N, F) among `real` (M, F), and of `real` among `generated` (Kynkäänniemi et al. 2019, eq. 1).

    A point is among others if it lies within the distance of one of them to that one's k-th neighbour. ValueError for too few points.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} pictures of each set, got {len(real)} and {len(generated)}")
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(f"features of {real.shape[1]} and {generated.shape[1]} dimensions cannot be compared")
    centre = real.float().mean(0)  # smaller numbers leave a smaller error in the difference of their squares
    real, generated = real.float() - centre, generated.float() - centre
    return _share_among(generated, real, k), _share_among(real, generated, k)


def _share_among(points: Tensor, others: Tensor, k: int) -> float:
    reach = torch.cat(
        [block.topk(k + 1, dim=1, largest=False).values[:, -1] for block in _blocks(others, others)]
    )  # the nearest is the point itself
    among = torch.cat([(block <= reach).any(1) for block in _blocks(points, others)])
    return float(among.double().mean())


def _blocks(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances (rows, M) of some rows of `a` (N, F) at a time to all of `b` (M, F)."""
    squares = b.square().sum(1)
    for rows in a.split(max(1, _BLOCK // len(b))):
        yield torch.addmm(squares, rows, b.T, alpha=-2).add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)


def nearest(points: Tensor, candidates: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Squared distances and indices, each (N, k), of the k candidates nearest to points (N, F); candidates come in parts (M, F).

    With fewer than k candidates the rest is infinitely far.
    """
    distances, indices = points.new_full((len(points), k), torch.inf), torch.zeros(len(points), k, dtype=torch.int64, device=points.device)
    first = 0
    for part in candidates:
        found = [block.topk(min(k, len(part)), dim=1, largest=False) for block in _blocks(points, part)]
        distances = torch.cat([distances, torch.cat([f.values for f in found])], 1)
        indices = torch.cat([indices, torch.cat([f.indices for f in found]) + first], 1)
        distances, kept = distances.topk(k, dim=1, largest=False)
        indices, first = indices.gather(1, kept), first + len(part)
    return distances, indices
