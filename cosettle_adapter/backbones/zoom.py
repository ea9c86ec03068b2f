"""Crops of a zoomed grid: the arithmetic of perturbed positions."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


def crop_corners(offsets: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor]:
    """First row and first column of each crop in the zoomed grid: two ``(S,)`` int64.

    Args:
        offsets: ``(S, 2)`` in [0, 1), (row, column): which of the places there are to crop at.
        grid: ``(h, w)``.
        ratio: by how much more than once the grid is zoomed.

    Raises:
        ValueError: offsets of another shape or range, or a ratio that is negative or not finite.
    """
    if not (math.isfinite(ratio) and ratio >= 0):
        raise ValueError(f"the ratio by which positions are zoomed must be 0 or more, got {ratio}")
    if offsets.ndim != 2 or offsets.shape[1] != 2 or not offsets.is_floating_point():
        raise ValueError(
            "expected offsets (S, 2), floating point, a row and a column for each variant, "
            f"got {tuple(offsets.shape)} {offsets.dtype}"
        )
    shares = offsets.detach().cpu().double()
    if not bool(((shares >= 0) & (shares < 1)).all()):
        raise ValueError(
            f"offsets must be in [0, 1), got {float(shares.min())} to {float(shares.max())}"
        )
    first_row, first_column = (
        (share * (zoomed_side(side, ratio) - side + 1)).long()
        for share, side in zip(shares.unbind(1), grid, strict=True)
    )
    return first_row, first_column


def zoomed_side(side: int, ratio: float) -> int:
    """Cells a side after zooming: 14 become 154 at the paper's ratio of 10."""
    return int((1 + ratio) * side)


def zoom_weights(side: int, ratio: float, dtype: torch.dtype) -> Tensor:
    """``(zoomed, side)``: what torch's bicubic zoom takes of each cell, on the CPU."""
    cells = rearrange(torch.eye(side, dtype=dtype), "c side -> 1 c side 1")
    size = (zoomed_side(side, ratio), 1)
    zoomed = F.interpolate(cells, size=size, mode="bicubic", align_corners=False)
    return rearrange(zoomed, "1 c zoomed 1 -> zoomed c")
