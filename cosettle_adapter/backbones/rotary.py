"""Rotary positions between cells: the angles behind timm's sines and cosines, perturbed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cosettle_adapter.backbones.zoom import Grid, crop_corners, zoomed_side

_SHRINK = 2.0**-20
_FREQUENCIES = {"bands": _SHRINK, "inv_freq": _SHRINK, "freqs": _SHRINK, "periods": 1 / _SHRINK}
_CLOSE = 1e-3


def rotary_angles(rope: nn.Module, grid: Grid) -> Tensor:
    """Return the angles by which a timm embedding rotates, which its sines and cosines hide.

    Sines and cosines tell angles apart only within one turn. So they are taken of an embedding
    whose frequencies are a million times lower, where every angle is small; frequencies scale
    angles, whatever else a kind of embedding does with coordinates.

    Args:
        rope: ``RotaryEmbeddingCat``, ``...DinoV3``, ``...Mixed`` or ``...MRope``, on the CPU.
        grid: ``(h, w)``.

    Returns:
        ``(h * w, D)`` float64 radians, ``(depth, heads, h * w, D)`` where blocks differ.

    Raises:
        ValueError: an embedding whose frequencies are stored otherwise.
    """
    slow: Any = copy.deepcopy(rope)
    with torch.no_grad():
        for name, tensor in (*slow.named_parameters(), *slow.named_buffers()):
            if name in _FREQUENCIES:
                tensor.mul_(_FREQUENCIES[name])
        sines, cosines = slow.get_embed(shape=list(grid)).double().chunk(2, dim=-1)
        angles = torch.atan2(sines, cosines) / _SHRINK
        true: Any = rope
        embedded = true.get_embed(shape=list(grid)).double()
    if not torch.allclose(torch.cat([angles.sin(), angles.cos()], -1), embedded, atol=_CLOSE):
        raise ValueError(
            f"rotary positions of {type(rope).__name__} cannot be perturbed: this version of timm "
            "stores their frequencies in a way that is not known here"
        )
    return angles


def perturb_rotary(
    angles: Tensor,
    offsets: Tensor,
    *,
    grid: Grid,
    ratio: float = 10.0,
    device: torch.device | None = None,
) -> Tensor:
    """Perturb rotary positions: rotate by the coordinates of a crop of the zoomed grid.

    What :func:`~cosettle_adapter.backbones.positions.perturb_positions` does to a learned
    embedding, done to coordinates: cell ``k`` of the zoomed grid lies at ``(k + 0.5) / zoom - 0.5``
    of the grid in use, and angles are linear between (and beyond) cells, so nothing is
    interpolated. Attention between patches then hardly sees how far they are apart; attention to
    class and register tokens, which are not rotated, sees nearly one place.

    Args:
        angles: ``(..., h * w, D)`` of the grid in use, as :func:`rotary_angles` returns them.
        offsets: ``(S, 2)`` in [0, 1), (row, column): places of ``S`` crops.
        grid: ``(h, w)``.
        ratio: by how much more than once to zoom; 0 changes nothing.
        device: where the result is wanted; that of ``angles`` by default.

    Returns:
        ``(S, ..., h * w, 2 D)`` float32, sines then cosines.

    Raises:
        ValueError: as :func:`~cosettle_adapter.backbones.zoom.crop_corners`.
    """
    cells = rearrange(angles.double(), "... (h w) d -> ... h w d", h=grid[0])
    first_row, first_column = crop_corners(offsets.cpu(), grid, ratio)
    down = _along(cells[..., :, 0, :], first_row, grid[0], ratio)
    across = _along(cells[..., 0, :, :], first_column, grid[1], ratio) - cells[..., 0, :1, :]
    down, across = (
        rearrange(down, "s ... h d -> s ... h 1 d"),
        rearrange(across, "s ... w d -> s ... 1 w d"),
    )
    # Angles of a sum: only rows and columns need float64, and only they travel to the device.
    sin_y, cos_y, sin_x, cos_x = (
        table.to(device or angles.device, torch.float32)
        for table in (down.sin(), down.cos(), across.sin(), across.cos())
    )
    rotary = torch.cat([sin_y * cos_x + cos_y * sin_x, cos_y * cos_x - sin_y * sin_x], dim=-1)
    return rearrange(rotary, "s ... h w d -> s ... (h w) d")


def _along(angles: Tensor, first: Tensor, side: int, ratio: float) -> Tensor:
    """Angles ``(..., side, D)`` of a row or column at the cells of crops: ``(S, ..., side, D)``."""
    zoom = side / zoomed_side(side, ratio)
    cells = rearrange(first.double(), "s -> s 1") + torch.arange(side) + 0.5
    places = (cells * zoom - 0.5).to(angles.device)
    # One row has no slope; that shifts all patches alike.
    slope = (angles[..., -1, :] - angles[..., 0, :]) / max(side - 1, 1)
    places = rearrange(places, f"s side -> s {'1 ' * (angles.ndim - 2)}side 1")
    return rearrange(angles[..., 0, :], "... d -> ... 1 d") + places * rearrange(
        slope, "... d -> ... 1 d"
    )
