"""Positional embeddings on other grids than the one they were learned on, and perturbed ones."""

from __future__ import annotations

import dataclasses
import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.backbones.row import PositionInterpolation
from cosettle_adapter.backbones.zoom import Grid, crop_corners, zoom_weights


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the patches of a batch of images are said to be: for one grid, resized already.

    Usually one variant serves every image. Several variants, along a leading dimension ``S``, are
    one an image in order, unless ``index`` says which image takes which.

    Attributes:
        absolute: ``(S, prefix + h * w, C)``, added to the tokens before the first block.
        rotary: ``(h * w, 2 D)``, sines then cosines, by which queries and keys are rotated in
            every block; ``(depth, heads, h * w, 2 D)`` where blocks differ; with several
            variants, ``(S, ...)`` of these.
        shift: ``(S, 2)`` int64, rows and columns of cells by which the picture is moved down and
            right on its canvas before it is encoded, what leaves it coming back in on the other
            side; the map is moved back, so that its cells show the same content.
        index: ``(B,)`` int64, the variant that each image takes.
    """

    absolute: Tensor | None = None
    rotary: Tensor | None = None
    shift: Tensor | None = None
    index: Tensor | None = None

    def to(self, device: torch.device) -> Positions:
        """Return the same positions on a device, embeddings in float32."""
        return Positions(
            None if self.absolute is None else self.absolute.to(device, torch.float32),
            None if self.rotary is None else self.rotary.to(device, torch.float32),
            None if self.shift is None else self.shift.to(device),
            None if self.index is None else self.index.to(device),
        )

    def for_images(self, variants: Tensor) -> Tensor:
        """Pick each image's variant ``(B, ...)`` of ``(S, ...)``; a single one stays alone."""
        return variants if self.index is None or len(variants) == 1 else variants[self.index]

    def check_like(self, own: Positions, grid: Grid, *, images: int) -> None:
        """Raise unless these can take the place of a backbone's ``own`` positions.

        Args:
            own: what the backbone uses by itself, one variant.
            grid: ``(h, w)`` of the images.
            images: how many there are.

        Raises:
            ValueError: another kind, another shape, or variants that do not go with the images.
        """
        variants: dict[str, int] = {}
        for kind in ("absolute", "rotary"):
            given, expected = getattr(self, kind), getattr(own, kind)
            if (given is None) != (expected is None):
                raise ValueError(
                    f"{'no ' if given is None else ''}{kind} positions were given, but this "
                    f"backbone has {'none' if expected is None else 'them'}"
                )
            if given is None:
                continue
            single = tuple(expected.shape[1:] if kind == "absolute" else expected.shape)
            shape = tuple(given.shape)
            several = shape[1:] == single and shape[0] > 0
            if not several and (kind == "absolute" or shape != single):
                sides = ", ".join(map(str, single))
                spelled = f"({'1 or B, ' if kind == 'absolute' else ''}{sides})"
                also = f" or one for each image (B, {sides})," if kind == "rotary" else ""
                raise ValueError(
                    f"expected {kind} positions {spelled} for grid {grid[0]} x {grid[1]},{also} "
                    f"got {shape}"
                )
            variants[kind] = shape[0] if several else 1
        if self.shift is not None:
            shape = tuple(self.shift.shape)
            if shape[1:] != (2,) or self.shift.dtype != torch.int64:
                raise ValueError(
                    "expected a shift (1 or B, 2) of whole rows and columns, int64, "
                    f"got {shape} {self.shift.dtype}"
                )
            variants["shift"] = shape[0]
        self._check_index(variants, images)

    def _check_index(self, variants: dict[str, int], images: int) -> None:
        if self.index is None:
            for kind, count in variants.items():
                if count not in (1, images):
                    raise ValueError(
                        f"{count} variants of {kind} positions were given for {images} images: "
                        "give 1, or one for each, or an index (B,) that says which is whose"
                    )
            return
        if tuple(self.index.shape) != (images,) or self.index.dtype != torch.int64:
            raise ValueError(
                f"expected an index ({images},) int64, a variant for each image, "
                f"got {tuple(self.index.shape)} {self.index.dtype}"
            )
        fewest = min((count for count in variants.values() if count > 1), default=None)
        if fewest is not None and not 0 <= int(self.index.min()) <= int(self.index.max()) < fewest:
            raise ValueError(
                f"the index names variants {int(self.index.min())} to {int(self.index.max())}, "
                f"but there are 0 to {fewest - 1}"
            )


def join_positions(own: Positions, others: Positions, index: Tensor) -> Positions:
    """Put a backbone's own positions (variant 0) before others (variants 1 to S).

    Args:
        own: of a grid, one variant.
        others: variants for the same grid, as :meth:`Backbone.perturbed_positions` makes them.
        index: ``(B,)`` int64, the variant that each image takes.
    """

    def together(first: Tensor | None, rest: Tensor | None) -> Tensor | None:
        return None if first is None or rest is None else torch.cat([first.to(rest.device), rest])

    rotary = None if own.rotary is None else rearrange(own.rotary, "... -> 1 ...")
    unmoved = None if others.shift is None else torch.zeros_like(others.shift[:1])
    return Positions(
        together(own.absolute, others.absolute),
        together(rotary, others.rotary),
        together(unmoved, others.shift),
        index,
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


def perturb_positions(
    positions: Tensor, offsets: Tensor, *, grid: Grid, prefix: int, ratio: float = 10.0
) -> Tensor:
    """Perturb absolute positions: zoom into the grid, crop a grid out of that (PEA).

    The paper's position embedding augmentation (section 3.2; ``interpolate_and_crop_pos_embed``
    in each model of the official code). The grid in use is resized to ``int((1 + ratio) * side)``
    cells a side, bicubic without antialiasing, and as many cells as it had are cropped at a random
    place. At the paper's ratio of 10 a crop spans little more than one cell (14 cells of 154), so
    that what is left says nearly the same about every patch. Positions of class and register
    tokens stay as they are.

    Args:
        positions: ``(1, prefix + h * w, C)``, resized to the grid in use.
        offsets: ``(S, 2)`` in [0, 1): where in the zoomed grid to crop, (row, column) as a share
            of the places there are; ``S`` variants come back.
        grid: ``(h, w)``.
        prefix: number of leading class and register positions.
        ratio: by how much more than once to zoom; 0 changes nothing.

    Returns:
        ``(S, prefix + h * w, C)`` on the device of ``positions``; float32, or float64 if they are.

    Raises:
        ValueError: offsets outside [0, 1), a negative ratio, or positions that do not fit the grid.
    """
    if positions.ndim != 3 or len(positions) != 1 or positions.shape[1] != prefix + math.prod(grid):
        raise ValueError(
            f"expected positions (1, {prefix + math.prod(grid)}, C) for {prefix} tokens and a grid "
            f"of {grid[0]} x {grid[1]}, got {tuple(positions.shape)}"
        )
    precise = positions if positions.dtype == torch.float64 else positions.float()
    leading, cells = precise[:, :prefix], precise[0, prefix:]
    rows, columns = (
        zoom_weights(side, ratio, precise.dtype)[first[:, None] + torch.arange(side)].to(
            precise.device
        )
        for side, first in zip(grid, crop_corners(offsets, grid, ratio), strict=True)
    )
    # Bicubic resizing is separable, so only what the crops need is computed.
    with torch.autocast(precise.device.type, enabled=False):
        cells = rearrange(cells, "(h w) c -> h w c", h=grid[0])
        cropped = torch.einsum(
            "sih,shjc->sijc", rows, torch.einsum("sjw,hwc->shjc", columns, cells)
        )
    cropped = rearrange(cropped, "s h w c -> s (h w) c")
    return torch.cat([leading.expand(len(cropped), -1, -1), cropped], dim=1)
