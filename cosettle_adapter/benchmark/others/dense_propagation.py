"""Label propagation as DINO's ``eval_video_segmentation.py`` does it: over whole affinities.

It stands for the published evaluation code (``label_propagation`` and ``restrict_neighborhood``):
the exponential of the affinity of all cells to all cells of all context frames, times a mask of
what is near enough, its top-k over everything, all others set to zero, each column divided by its
sum, and a matrix product with the labels. Where the script repeats the mask and the frame once for
each context frame, here both are broadcast, and the mask is made once for a clip as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1


def neighbourhood(grid: tuple[int, int], radius: int, *, like: Tensor) -> Tensor:
    """Return 1 where two cells are within ``radius`` rows and columns: ``(h w, h w)``."""
    rows, columns = (torch.arange(side, device=like.device) for side in grid)
    near_rows = (rearrange(rows, "a -> a 1") - rows).abs() <= radius
    near_columns = (rearrange(columns, "a -> a 1") - columns).abs() <= radius
    near = rearrange(near_rows, "a b -> a 1 b 1") & rearrange(near_columns, "s t -> 1 s 1 t")
    return rearrange(near, "a s b t -> (a s) (b t)").to(like.dtype)


@torch.inference_mode()
def propagate(
    target: Tensor, context: Sequence[Tensor], labels: Sequence[Tensor], near: Tensor, *, topk: int
) -> Tensor:
    """Return the labels of one frame.

    Args:
        target: ``(C, h, w)`` features of the frame.
        context: ``(C, h, w)`` features of each context frame.
        labels: ``(K, h, w)`` soft labels of each.
        near: of :func:`neighbourhood`.
        topk: cells that count.

    Returns:
        ``(K, h, w)``.
    """
    query = F.normalize(rearrange(target, "c h w -> (h w) c"), dim=1)
    sources = F.normalize(
        torch.stack([rearrange(each, "c h w -> c (h w)") for each in context]), dim=1
    )
    affinity = torch.exp(torch.matmul(query, sources) / TEMPERATURE)
    affinity *= near
    affinity = rearrange(affinity, "n target source -> (n source) target")
    best, _ = torch.topk(affinity, dim=0, k=topk)
    least, _ = torch.min(best, dim=0)
    affinity[affinity < least] = 0
    affinity = affinity / torch.sum(affinity, keepdim=True, dim=0)
    known = torch.cat([rearrange(each, "k h w -> k (h w)") for each in labels], dim=1)
    found = known @ affinity
    return rearrange(found, "k (h w) -> k h w", h=target.shape[1])
