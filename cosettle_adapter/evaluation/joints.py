"""Joints by label propagation: heat maps of the first frame in, positions out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from torch import Tensor

from cosettle_adapter.correspondence import propagate_labels

_SIGMA = 0.5  # cells
_REACH = 3  # standard deviations that are drawn
_BEST = 5  # cells whose centroid is a joint's position


def joint_heat_maps(cells: Tensor, grid: tuple[int, int], *, sigma: float = _SIGMA) -> Tensor:
    """Draw a Gaussian for every joint.

    Args:
        cells: ``(J, 2)`` fractional (row, col) cells.
        grid: ``(h, w)``.
        sigma: standard deviation in cells.

    Returns:
        ``(J, h, w)`` float32, 1 where a joint lies on a cell's centre, 0 beyond three standard
        deviations (in whole cells): a joint well outside the frame leaves its map empty.
    """
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in grid)
    row, column = cells.float().unbind(-1)
    down = rearrange(rows, "h -> 1 h 1") - rearrange(row, "j -> j 1 1")
    right = rearrange(columns, "w -> 1 1 w") - rearrange(column, "j -> j 1 1")
    near = (down.abs() <= math.ceil(_REACH * sigma)) & (right.abs() <= math.ceil(_REACH * sigma))
    return torch.exp(-(down**2 + right**2) / (2 * sigma**2)) * near


def decode_joints(heat_maps: Tensor, *, best: int = _BEST) -> tuple[Tensor, Tensor]:
    """Read positions out of heat maps: the centroid of the strongest cells, by their weight.

    Args:
        heat_maps: ``(..., J, h, w)``, not negative.
        best: number of cells.

    Returns:
        ``(..., J, 2)`` fractional (row, col) cells, and ``(..., J)`` whether there was anything:
        a map that is empty everywhere gives no position.
    """
    width = heat_maps.shape[-1]
    flat = rearrange(heat_maps, "... h w -> ... (h w)")
    weights, index = flat.topk(min(best, flat.shape[-1]), dim=-1)
    found = weights.sum(-1) > 0
    share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    places = torch.stack([index // width, index % width], dim=-1).to(share)
    return reduce(share[..., None] * places, "... k two -> ... two", "sum"), found


def propagate_joints(
    features: Tensor | Iterable[Tensor],
    cells: Tensor,
    *,
    protocol: Literal["crw", "dino"] = "crw",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Carry joints of the first frame through a clip.

    Args:
        features: ``(T, C, h, w)``, or an iterable of maps.
        cells: ``(J, 2)`` fractional (row, col) cells of frame 0.
        protocol: as in :func:`~cosettle_adapter.correspondence.propagate_labels`.
        **options: likewise.

    Returns:
        ``(T, J, 2)`` fractional cells and ``(T, J)`` whether a joint is still to be seen.
    """
    maps = iter(features)
    first = next(maps)
    heat = joint_heat_maps(cells, (first.shape[-2], first.shape[-1])).to(first.device)
    labels = propagate_labels(_chain(first, maps), heat, protocol=protocol, **options)
    return decode_joints(labels)


def _chain(first: Tensor, rest: Iterable[Tensor]) -> Iterable[Tensor]:
    yield first
    yield from rest
