"""Averaging within a frame: every patch with the patches near by that are most similar to it.

Non-local means (Buades, Coll & Morel, "A non-local algorithm for image denoising", CVPR 2005) on
a feature map. Patches of one object agree in what they show and differ in noise and in position;
their mean keeps the former. Temporal fusion does the same between frames.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

# Chosen on DAVIS sequences by label propagation: radii of 2 and 5 are within 0.4 J&F, an unlimited
# one costs 2.
RADIUS = 3
NEIGHBOURS = 5
TEMPERATURE = 0.1

_BAND = 4  # rows of patches compared at a time


def average_neighbours(features: Tensor, share: float) -> Tensor:
    """Average every patch with its most similar neighbours in the same frame.

    With x_i the feature of patch i, the result is ``(1 - share) x_i + share m_i``, where m_i is
    the mean of the five patches within three patches of i that are most similar to it (cosine),
    weighted by softmax(cosine / 0.1).

    Args:
        features: ``(B, C, h, w)`` floating point.
        share: weight of the neighbours, in [0, 1).

    Returns:
        ``(B, C, h, w)``, dtype of ``features``. A map of a single patch is returned as it is.
    """
    batch, _, height, width = features.shape
    count = min(NEIGHBOURS, height * width - 1)
    if count < 1 or share == 0:
        return features
    patches = rearrange(features.float(), "b c h w -> b (h w) c")
    unit = F.normalize(patches, dim=-1)
    frame = torch.arange(batch, device=features.device) * (height * width)
    means = []
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        low, high = max(0, top - RADIUS), min(height, bottom + RADIUS)
        keys = unit[:, low * width : high * width]
        cosine = einsum(unit[:, top * width : bottom * width], keys, "b q c, b n c -> b q n")
        near = _neighbours(range(top, bottom), range(low, high), width, features.device)
        cosine, index = cosine.masked_fill(~near, -torch.inf).topk(min(count, keys.shape[1]))
        weights = torch.softmax(cosine / TEMPERATURE, dim=-1)
        index = index + low * width + rearrange(frame, "b -> b 1 1")
        means.append(_weighted(rearrange(patches, "b n c -> (b n) c"), index, weights))
    averaged = torch.lerp(patches, torch.cat(means, dim=1), share)
    return rearrange(averaged, "b (h w) c -> b c h w", h=height).to(features.dtype)


def _neighbours(rows: range, others: range, width: int, device: torch.device) -> Tensor:
    """``(q, n)`` bool: which patches of the rows ``others`` are neighbours of those of ``rows``."""
    places = [
        torch.cartesian_prod(
            torch.arange(each.start, each.stop, device=device), torch.arange(width, device=device)
        )
        for each in (rows, others)
    ]
    offset = rearrange(places[0], "q yx -> q 1 yx") - rearrange(places[1], "n yx -> 1 n yx")
    squared = offset.square().sum(-1)
    return (squared > 0) & (squared <= RADIUS**2)


def _weighted(patches: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``(B, q, C)``: sums of the patches ``(B n, C)`` at an index ``(B, q, k)``, by weights."""
    if torch.compiler.is_exporting():  # ONNX has no embedding_bag
        return einsum(patches[index], weights, "b q k c, b q k -> b q c")
    flat, by = (rearrange(each, "b q k -> (b q) k") for each in (index, weights))
    found = F.embedding_bag(flat, patches, mode="sum", per_sample_weights=by)
    return rearrange(found, "(b q) c -> b q c", b=len(index))
