"""The kernel distance: KID in Inception's features (Bińkowski et al. 2018). Unlike a Fréchet distance it is unbiased for few pictures."""

import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy of features (N, F) and (M, F), kernel (x·y/F + 1)³; may be below 0."""
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_kernel(a, a), _kernel(b, b))]
    return within[0] + within[1] - 2 * _kernel(a, b).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(features_a: Tensor, features_b: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE) -> float:
    """The mean of `squared_mmd` over random subsets of features (N, F) and (M, F), always the same ones, in float64.

    Sets that are smaller than a subset are compared as far as they go. ValueError for fewer than two pictures or other dimensions.
    """
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 pictures of each set, got {len(features_a)} and {len(features_b)}")
    if features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"features of {features_a.shape[1]} and {features_b.shape[1]} dimensions cannot be compared")
    if max(len(features_a), len(features_b)) <= subset_size:
        subsets = 1  # each would be all of them
    random = torch.Generator().manual_seed(0)

    def chosen(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=random)[:subset_size].to(features.device)].double()

    found = [squared_mmd(chosen(features_a), chosen(features_b)) for _ in range(subsets)]
    return float(torch.stack(found).mean())
