"""How a cloud of patches lies in space: its extent, the distances in it, its rank."""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

_ROWS = 64  # videos compared with all others at a time


def percentile_of(ordered: Tensor, percentile: float) -> float:
    """Linear between ranks; torch.quantile refuses more than 16 million values."""
    position = percentile / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], position - low))


def mean_distances(samples: Tensor) -> Tensor:
    """Mean distance of each of ``(V, S, C)`` to all others, ``(V,)``; NaN for one alone."""
    everyone = rearrange(samples, "v s c -> s v c")
    sums = [
        reduce(torch.cdist(block, everyone), "s v u -> v", "sum")
        for block in torch.split(everyone, _ROWS, dim=1)
    ]
    videos, positions, _ = samples.shape
    pairs = videos - 1
    return torch.cat(sums) / (positions * pairs if pairs else math.nan)


def effective_rank(gram: Tensor, tokens: int) -> float:
    """Effective rank of a matrix ``(tokens, C)`` given its ``(C, C)`` inner products."""
    most = min(tokens, len(gram))
    squared = torch.linalg.eigvalsh(gram)[-most:]
    # what is left of singular values that are zero
    noise = squared[-1].clamp_min(0) * len(gram) * torch.finfo(gram.dtype).eps
    singular = squared[squared > noise].sqrt()
    if not len(singular):
        return math.nan
    shares = singular / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) / most
