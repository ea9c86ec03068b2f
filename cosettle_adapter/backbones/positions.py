"""Positional embeddings on grids other than the one they were learned on."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones.registry import PositionInterpolation

Grid = tuple[int, int]


def resize_positions(
    positions: Tensor,
    grid: Grid,
    *,
    source_grid: Grid,
    prefix: int,
    interpolation: PositionInterpolation,
) -> Tensor:
    """Resize absolute positions to another grid, bicubic, in float32, on their own device.

    Encoders' authors differ in the details, and the details change features; ``interpolation``
    names the variant (official code of DINO, MAE and DINOv2: ``scale+0.1``; of DINOv2 with
    registers, CLIP and BLIP, and timm's default: ``size+antialias``).

    Args:
        positions: ``(1, prefix + h0 * w0, C)``.
        grid: ``(h, w)`` wanted.
        source_grid: ``(h0, w0)`` the embedding was learned on.
        prefix: number of leading class and register positions, which are left alone.
        interpolation: ``size+antialias``, ``size`` (no antialiasing) or ``scale+0.1``.

    Returns:
        ``(1, prefix + h * w, C)``, float32.
    """
    positions = positions.float()
    if grid == source_grid:
        return positions
    leading, cells = positions[:, :prefix], positions[:, prefix:]
    cells = rearrange(cells, "1 (h w) c -> 1 c h w", h=source_grid[0], w=source_grid[1])
    if interpolation == "scale+0.1":
        # The 0.1 keeps floor(h0 * scale) from falling one short of h (sides such as 546 and 602).
        scale = tuple((side + 0.1) / source for side, source in zip(grid, source_grid, strict=True))
        cells = F.interpolate(cells, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        antialias = interpolation == "size+antialias"
        cells = F.interpolate(
            cells, size=grid, mode="bicubic", align_corners=False, antialias=antialias
        )
    return torch.cat([leading, rearrange(cells, "1 c h w -> 1 (h w) c")], dim=1)
