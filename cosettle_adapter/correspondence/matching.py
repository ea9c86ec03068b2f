"""Mutual nearest neighbours of two feature maps."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence.maps import unit_map
from cosettle_adapter.errors import GeometryError


@torch.no_grad()
def mutual_nearest(a: Tensor, b: Tensor, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the pairs of cells that are each other's nearest neighbour by cosine.

    Args:
        a: ``(C, h, w)``, any floating dtype.
        b: ``(C, h', w')`` on the same device; the grids may differ.
        chunk: cells of ``a`` compared at a time; bounds memory and does not change the result.

    Returns:
        Flat cell indices ``(M, 2)`` int64, in ``a`` (ascending) and in ``b``, row-major; and the
        pairs' cosines ``(M,)``. Among equally near cells the first one counts, so identical
        cells are matched at most once.

    Raises:
        GeometryError: maps of other shapes or with different channels.
        ValueError: ``chunk`` below 1.

    Example:
        >>> map_a = torch.randn(8, 3, 4)
        >>> pairs, cosine = mutual_nearest(map_a, map_a)
        >>> bool((pairs[:, 0] == pairs[:, 1]).all()), len(cosine)
        (True, 12)
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    a, b = unit_map(a), unit_map(b)
    if len(a) != len(b):
        raise GeometryError(
            f"got maps of {len(a)} and {len(b)} channels, expected the same number: "
            "compare features of one model"
        )
    rows, columns = rearrange(a, "c h w -> (h w) c"), rearrange(b, "c h w -> c (h w)")
    ahead, cosine = [], []
    back_cosine = rows.new_full((columns.shape[1],), -torch.inf)
    back = torch.zeros(columns.shape[1], dtype=torch.long, device=rows.device)
    for start in range(0, len(rows), chunk):
        block = rows[start : start + chunk] @ columns
        best, index = block.max(1)
        ahead.append(index)
        cosine.append(best)
        best, index = block.max(0)
        better = best > back_cosine
        back_cosine = torch.where(better, best, back_cosine)
        back = torch.where(better, index + start, back)
    forth = torch.cat(ahead)
    here = torch.arange(len(rows), device=rows.device)
    mutual = back[forth] == here
    pairs = torch.stack([here[mutual], forth[mutual]], dim=1)
    return pairs, torch.cat(cosine)[mutual]
