"""The Inception Score: how sure a classifier is of each picture, and how evenly its classes occur (Salimans et al. 2016)."""

import torch
from torch import Tensor

SPLIT = 5000  # pictures of a split, as ADM's evaluation has it: the score of more pictures is higher


def inception_score(logits: Tensor, split_size: int = SPLIT) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)) over the pictures of a split, logits (N, K) in the order given; the mean over the splits.

    Between 1 and K. ValueError for no pictures or values that are not finite.
    """
    if logits.ndim != 2 or not len(logits) or not torch.isfinite(logits).all():
        raise ValueError(f"an Inception Score needs finite logits (N, K) of at least one picture, got {tuple(logits.shape)}")
    scores = [_score(part.cpu().double().log_softmax(1)) for part in logits.split(split_size)]
    return float(torch.stack(scores).mean())


def _score(log_p: Tensor) -> Tensor:
    log_marginal = log_p.logsumexp(0) - torch.tensor(len(log_p), dtype=log_p.dtype).log()
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()
