"""How a frame becomes a grid of patch cells, and the way back to pixels.

Pixel coordinates are (x, y) in the original frame and continuous: pixel (0, 0) covers
``[0, 1) x [0, 1)`` and has its centre at (0.5, 0.5). Cell coordinates are (row, col), whole at the
cells' centres. Cell (i, j) has its centre at ``patch / 2 + stride * (i, j)`` of the frame the
encoder sees, which is the original frame resized and, with ``fit="pad"``, extended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video.sides import (
    as_sides,
    check_side,
    check_steps,
    check_valid,
    nearest_valid,
    next_valid,
    whole,
)

Fit = Literal["resize", "pad"]


@dataclass(frozen=True)
class Geometry:
    """The way from a frame to the encoder's grid; made by :func:`plan_geometry`.

    Attributes:
        frame: (H, W) of the original frame.
        resized: (H, W) after resizing, before padding.
        padded: (H, W) the encoder sees; equals ``resized`` unless ``fit="pad"``.
        patch: side of a patch in the encoder's pixels.
        stride: step between patches in the encoder's pixels.
        fit: ``"resize"`` or ``"pad"``.

    Raises:
        GeometryError: the fields contradict each other.
    """

    frame: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]
    patch: int
    stride: int
    fit: Fit

    def __post_init__(self) -> None:
        check_steps(self.patch, self.stride, self.fit)
        for name in ("frame", "resized", "padded"):
            as_sides(name, getattr(self, name))
        for axis, seen, resized in zip(("height", "width"), self.padded, self.resized, strict=True):
            check_valid(f"padded {axis}", seen, self.patch, self.stride)
            if seen < resized or (self.fit == "resize" and seen != resized):
                raise GeometryError(
                    f"padded {axis} {seen} does not go with resized {axis} {resized} under "
                    f"fit={self.fit!r}; make geometries with plan_geometry"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the grid of cells."""
        h, w = (1 + (side - self.patch) // self.stride for side in self.padded)
        return h, w

    @property
    def scale(self) -> tuple[float, float]:
        """(sy, sx): encoder pixels per pixel of the original frame."""
        return self.resized[0] / self.frame[0], self.resized[1] / self.frame[1]

    def cell_centers(self) -> Tensor:
        """Centre of every cell in the original frame.

        Returns:
            (h, w, 2) float64 tensor of (x, y) pixels. Cells that lie mostly on padding have
            centres beyond the frame's bottom or right edge.
        """
        rows, cols = (torch.arange(n, dtype=torch.float64) for n in self.grid)
        return self.cells_to_pixels(torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1))

    def cells_to_pixels(self, cells: Tensor) -> Tensor:
        """Map (row, col) cells, whole or fractional, to (x, y) pixels of the original frame.

        Args:
            cells: (..., 2) tensor of (row, col).

        Returns:
            (..., 2) tensor of (x, y) in the dtype of ``cells``; integers become float64.

        Raises:
            GeometryError: the last axis is not 2 long.
        """
        row, col = _pairs(cells, "cells", "(row, col)")
        sy, sx = self.scale
        x = (self.patch / 2 + self.stride * col) / sx
        y = (self.patch / 2 + self.stride * row) / sy
        return torch.stack((x, y), dim=-1)

    def pixels_to_cells(self, points: Tensor) -> Tensor:
        """Map (x, y) pixels of the original frame to fractional (row, col) cells.

        The inverse of :meth:`cells_to_pixels`; nothing is rounded or clamped.

        Args:
            points: (..., 2) tensor of (x, y).

        Returns:
            (..., 2) tensor of (row, col) in the dtype of ``points``; integers become float64.

        Raises:
            GeometryError: the last axis is not 2 long.
        """
        x, y = _pairs(points, "points", "(x, y)")
        sy, sx = self.scale
        row = (y * sy - self.patch / 2) / self.stride
        col = (x * sx - self.patch / 2) / self.stride
        return torch.stack((row, col), dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready lists, numbers and strings."""
        fields = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Geometry:
        """Rebuild a geometry from :meth:`to_dict`.

        Raises:
            GeometryError: a field is missing, unknown or contradicts the others.
        """
        known = set(cls.__dataclass_fields__)
        if set(fields) != known:
            raise GeometryError(
                f"a geometry has the fields {sorted(known)}; "
                f"missing {sorted(known - set(fields))}, unknown {sorted(set(fields) - known)}"
            )
        return cls(
            frame=as_sides("frame", fields["frame"]),
            resized=as_sides("resized", fields["resized"]),
            padded=as_sides("padded", fields["padded"]),
            patch=fields["patch"],
            stride=fields["stride"],
            fit=fields["fit"],
        )


def plan_geometry(
    height: int,
    width: int,
    *,
    patch: int,
    stride: int | None = None,
    size: int | tuple[int, int] | None = None,
    fit: Fit = "resize",
) -> Geometry:
    """Decide how frames of one size are brought to a size the encoder can cut into patches.

    An encoder takes sides of ``patch + k * stride`` pixels. With ``fit="resize"`` each side goes
    to the nearest such number (the larger of two equally near), which may bend the aspect ratio
    by a few pixels. With ``fit="pad"`` the aspect ratio is kept and the bottom and right edge are
    replicated up to the next such number.

    Args:
        height: height of the frames in pixels.
        width: width of the frames in pixels.
        patch: side of a patch.
        stride: step between patches, at most ``patch``, which is the default.
        size: None for the frame's own size; an int for the length of the short side, aspect kept;
            (H, W) for exactly what the encoder shall see, both ``patch + k * stride``. With
            ``fit="pad"``, (H, W) is the box the frame is fitted into.
        fit: ``"resize"`` or ``"pad"``.

    Raises:
        GeometryError: a side is not positive, a frame is smaller than a patch and no ``size`` is
            given, ``size`` is not made of valid sides, or the stride does not go with the patch.

    Example:
        >>> plan_geometry(480, 854, patch=14, size=224).grid
        (16, 28)
    """
    patch, stride = check_steps(patch, patch if stride is None else stride, fit)
    frame = as_sides("frame", (height, width))
    if isinstance(size, (tuple, list)):
        return _into_box(frame, as_sides("size", size), patch, stride, fit)
    if size is None:
        for axis, side in zip(("height", "width"), frame, strict=True):
            if side < patch:
                raise GeometryError(
                    f"frame {axis} {side} is smaller than one patch of {patch}; "
                    f"pass size= to enlarge the frames, for example size={16 * patch}"
                )
        short = min(frame)
    else:
        short = check_side("size", size)
    target = (frame[0] * short / min(frame), frame[1] * short / min(frame))
    if fit == "pad":
        resized = (whole(target[0]), whole(target[1]))
        padded = (next_valid(resized[0], patch, stride), next_valid(resized[1], patch, stride))
        return Geometry(frame, resized, padded, patch, stride, fit)
    seen = (nearest_valid(target[0], patch, stride), nearest_valid(target[1], patch, stride))
    return Geometry(frame, seen, seen, patch, stride, fit)


def _pairs(values: Tensor, name: str, meaning: str) -> tuple[Tensor, Tensor]:
    if values.ndim == 0 or values.shape[-1] != 2:
        raise GeometryError(
            f"got {name} of shape {tuple(values.shape)}, expected (..., 2) with {meaning} last"
        )
    if not values.is_floating_point():
        # the Metal backend has no float64
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    first, second = values.unbind(-1)
    return first, second


def _into_box(
    frame: tuple[int, int], box: tuple[int, int], patch: int, stride: int, fit: Fit
) -> Geometry:
    for axis, side in zip(("height", "width"), box, strict=True):
        check_valid(f"size {axis}", side, patch, stride)
    if fit == "resize":
        return Geometry(frame, box, box, patch, stride, fit)
    factor = min(box[0] / frame[0], box[1] / frame[1])
    # the shorter side of a very long frame may round to nothing
    resized = max(1, whole(frame[0] * factor)), max(1, whole(frame[1] * factor))
    return Geometry(frame, resized, box, patch, stride, fit)
