"""Positional embeddings on grids other than the one they were learned on."""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones.row import PositionInterpolation

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Positions:
    """A positional embedding for one grid, resized or perturbed already.

    Attributes:
        absolute: ``(1 or B, prefix + h * w, C)``, added to the tokens before the first block.
        rotary: ``(h * w, 2 D)``, sines then cosines, by which queries and keys are rotated in
            every block; ``(depth, heads, h * w, 2 D)`` where blocks differ.
    """

    absolute: Tensor | None = None
    rotary: Tensor | None = None

    def to(self, device: torch.device) -> Positions:
        """Return the same positions in float32 on a device."""
        return Positions(
            *(
                None if kind is None else kind.to(device, torch.float32)
                for kind in (self.absolute, self.rotary)
            )
        )

    def check_like(self, own: Positions, grid: Grid) -> None:
        """Raise unless these can take the place of a backbone's ``own`` positions.

        Raises:
            ValueError: another kind, or another shape; the absolute ones may have a batch.
        """
        for kind in ("absolute", "rotary"):
            given, expected = getattr(self, kind), getattr(own, kind)
            if (given is None) != (expected is None):
                raise ValueError(
                    f"{'no ' if given is None else ''}{kind} positions were given, but this "
                    f"backbone has {'none' if expected is None else 'them'}"
                )
            if given is None:
                continue
            shape, wanted = tuple(given.shape), tuple(expected.shape)
            batched = kind == "absolute" and len(shape) == 3
            if shape[batched:] != wanted[batched:]:
                leading = f"1 or B, {', '.join(map(str, wanted[1:]))}" if batched else str(wanted)
                raise ValueError(
                    f"expected {kind} positions ({leading.strip('()')}) for grid "
                    f"{grid[0]} x {grid[1]}, got {shape}"
                )


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
