"""Map frames to the encoder's grid of patches and back: sizes, coordinates, resampling.

Pixel coordinates are continuous (x, y) in the original frame: pixel (0, 0) covers
``[0, 1) x [0, 1)``, with its centre at (0.5, 0.5). Grid coordinates are (row, col), integers at
the centres of patches. The centre of patch (i, j) is at ``patch / 2 + stride * (i, j)`` in the
encoder's input, which is the original frame resized and, with ``fit="pad"``, padded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError

Fit = Literal["resize", "pad"]


@dataclass(frozen=True)
class Geometry:
    """Mapping from a frame to the encoder's grid, by :func:`plan_geometry`; sizes are (H, W)."""

    frame: tuple[int, int]  # the original frame
    resized: tuple[int, int]  # after resizing, before padding
    padded: tuple[int, int]  # the encoder's input; ``resized`` unless ``fit="pad"``
    patch: int  # side of a patch in pixels of the encoder's input
    stride: int  # step between patches in these pixels
    fit: Fit

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the grid of patches."""
        h, w = (1 + (side - self.patch) // self.stride for side in self.padded)
        return h, w

    @property
    def scale(self) -> tuple[float, float]:
        """(sy, sx): encoder pixels per pixel of the original frame."""
        return self.resized[0] / self.frame[0], self.resized[1] / self.frame[1]

    def cell_centers(self) -> Tensor:
        """Return the centres of all patches in the original frame: (h, w, 2) float64 (x, y) pixels.

        Centres of patches that lie mostly on padding are beyond its bottom or right edge.
        """
        rows, cols = (torch.arange(n, dtype=torch.float64) for n in self.grid)
        return self.cells_to_pixels(torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1))

    def cells_to_pixels(self, cells: Tensor) -> Tensor:
        """Map (..., 2) grid coordinates (row, col) to (x, y) pixels of the original frame.

        Floats keep their dtype; integers become float64, on MPS float32.
        """
        row, col = _pairs(cells, "cells", "(row, col)")
        sy, sx = self.scale
        x = (self.patch / 2 + self.stride * col) / sx
        y = (self.patch / 2 + self.stride * row) / sy
        return torch.stack((x, y), dim=-1)

    def pixels_to_cells(self, points: Tensor) -> Tensor:
        """Map (..., 2) pixels (x, y) to fractional (row, col), neither rounded nor clamped."""
        x, y = _pairs(points, "points", "(x, y)")
        sy, sx = self.scale
        row = (y * sy - self.patch / 2) / self.stride
        col = (x * sx - self.patch / 2) / self.stride
        return torch.stack((row, col), dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready lists, numbers and strings."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """Rebuild a geometry from :meth:`to_dict`; raise :class:`GeometryError` on other fields."""
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise GeometryError(f"{dict(values)} is not a geometry: {error}") from error


def plan_geometry(
    height: int,
    width: int,
    *,
    patch: int,
    stride: int | None = None,
    size: int | tuple[int, int] | None = None,
    fit: Fit = "resize",
) -> Geometry:
    """Plan how frames of one size are resized or padded to whole patches.

    The sides of an encoder's input are ``patch + k * stride`` pixels. ``fit="resize"`` resizes
    each side to the nearest such length (the larger of two equally near), which may change the
    aspect ratio by a few pixels. ``fit="pad"`` keeps the aspect ratio and replicates the bottom
    and right edges up to the next such length.

    Args:
        height, width, patch: of the frames, and the side of a patch, in pixels.
        stride: step between patches in pixels; ``patch`` by default.
        size: None for the frame's own size; an int for the length of the shorter side, with the
            aspect ratio kept; (H, W) for the exact encoder input, both ``patch + k * stride``.
            With ``fit="pad"``, (H, W) is the box the frame is fitted into.

    Raises:
        GeometryError: invalid values; the message names the nearest valid ones.
    """
    patch = check_side("patch", patch)
    stride = patch if stride is None else check_side("stride", stride)
    if stride > patch:
        raise GeometryError(f"stride {stride} would skip pixels; use one from 1 to patch {patch}")
    if fit not in get_args(Fit):
        raise GeometryError(f"got fit={fit!r}, expected 'resize' or 'pad'")
    frame = as_sides("frame", (height, width))
    if isinstance(size, (tuple, list)):
        box = as_sides("size", size)
        for axis, side in zip(("height", "width"), box, strict=True):
            lower = patch + stride * max(0, (side - patch) // stride)
            if side != lower:
                raise GeometryError(
                    f"size {axis} {side} is not patch + k * stride for patch {patch} and stride "
                    f"{stride}; the nearest that are: {lower} and {lower + stride}"
                )
        factor = min(box[0] / frame[0], box[1] / frame[1])
        # the shorter side of a very long frame may round to zero
        inner = (max(1, _round(frame[0] * factor)), max(1, _round(frame[1] * factor)))
        return Geometry(frame, inner if fit == "pad" else box, box, patch, stride, fit)
    if size is None and min(frame) < patch:
        axis = "height" if height < patch else "width"
        raise GeometryError(
            f"frame {axis} {min(frame)} is smaller than one patch of {patch}; "
            f"pass size= to enlarge the frames, for example size={16 * patch}"
        )
    short = min(frame) if size is None else check_side("size", size)
    target = (frame[0] * short / min(frame), frame[1] * short / min(frame))
    if fit == "pad":
        resized = (_round(target[0]), _round(target[1]))
        steps = [max(0, -((patch - side) // stride)) for side in resized]
        padded = (patch + stride * steps[0], patch + stride * steps[1])
        return Geometry(frame, resized, padded, patch, stride, fit)
    resized = (nearest_valid(target[0], patch, stride), nearest_valid(target[1], patch, stride))
    return Geometry(frame, resized, resized, patch, stride, fit)


def apply_geometry(frames: Tensor, geometry: Geometry) -> Tensor:
    """Resize and pad frames to the encoder's input size.

    Maps (T, 3, H, W) uint8 in [0, 255] or float in [0, 1] to (T, 3, H', W') of ``geometry.padded``
    in the same range: float32 if they are resized, otherwise in their own dtype. Frames of the
    right size are returned unchanged. Another (H, W) than planned is a :class:`GeometryError`.
    """
    if frames.ndim != 4 or tuple(frames.shape[-2:]) != geometry.frame:
        raise GeometryError(
            f"got frames of shape {tuple(frames.shape)}, but the geometry was planned for "
            f"(T, 3, {geometry.frame[0]}, {geometry.frame[1]}): plan one for this frame size"
        )
    if geometry.resized != geometry.frame:
        frames = resize(frames, geometry.resized)
    bottom, right = (p - r for p, r in zip(geometry.padded, geometry.resized, strict=True))
    # torch's replicate padding does not support uint8
    if bottom:
        frames = torch.cat((frames, frames[..., -1:, :].expand(-1, -1, bottom, -1)), dim=-2)
    if right:
        frames = torch.cat((frames, frames[..., -1:].expand(-1, -1, -1, right)), dim=-1)
    return frames


def resample_to_points(features: Tensor, geometry: Geometry, points: Tensor) -> Tensor:
    """Sample features at pixels of the original frame, bilinearly between patch centres.

    Args:
        features: (T, C, h, w) floats on ``geometry.grid``.
        points: (N, 2) or (hh, ww, 2) pixels (x, y). Beyond the outermost patch centres, features
            continue with their value at the border.

    Returns:
        (T, C, N) or (T, C, hh, ww) in the dtype and on the device of ``features``.

    Raises:
        GeometryError: other shapes, or points that are not finite.
    """
    h, w = geometry.grid
    if features.ndim != 4 or tuple(features.shape[-2:]) != (h, w):
        raise GeometryError(
            f"got features of shape {tuple(features.shape)}, expected (T, C, {h}, {w}): "
            "the grid of this geometry"
        )
    if points.ndim not in (2, 3):
        raise GeometryError(
            f"got points of shape {tuple(points.shape)}, expected (N, 2) or (hh, ww, 2)"
        )
    cells = geometry.pixels_to_cells(points)
    if not bool(torch.isfinite(cells).all()):
        raise GeometryError("points hold NaN or infinite values; remove those points")
    # not grid_sample, whose float32 coordinates are off by 1e-5 of a patch; coordinates stay on
    # their own device, because MPS has no float64
    values = features.to(torch.promote_types(features.dtype, torch.float32))
    row, col = cells[..., 0].clamp(0, h - 1), cells[..., 1].clamp(0, w - 1)
    down, across = (axis.frac().to(values.dtype).to(values.device) for axis in (row, col))
    top, left = (axis.long().to(values.device) for axis in (row, col))
    bottom, right = (top + 1).clamp(max=h - 1), (left + 1).clamp(max=w - 1)
    above = torch.lerp(values[..., top, left], values[..., top, right], across)
    below = torch.lerp(values[..., bottom, left], values[..., bottom, right], across)
    return torch.lerp(above, below, down).to(features.dtype)


def resize(frames: Tensor, sides: tuple[int, int]) -> Tensor:
    """Resize (T, C, H, W) frames to ``sides``: float32, bicubic, antialiased, range kept."""
    top = 255.0 if frames.dtype == torch.uint8 else 1.0
    pixels = frames.to(torch.float32)
    try:
        resized = F.interpolate(pixels, size=sides, mode="bicubic", antialias=True)
    except NotImplementedError:  # MPS may lack this kernel
        pixels = F.interpolate(pixels.cpu(), size=sides, mode="bicubic", antialias=True)
        resized = pixels.to(frames.device)
    return resized.clamp_(0.0, top)


def nearest_valid(length: float, patch: int, stride: int) -> int:
    """Return the side ``patch + k * stride`` nearest to a length, of two the larger."""
    return patch + stride * max(0, _round((length - patch) / stride))


def as_sides(name: str, sides: Any) -> tuple[int, int]:
    """Return (height, width) as ints of at least 1; errors call them ``name``."""
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise GeometryError(f"{name} must be (height, width), got {sides!r}")
    return check_side(f"{name} height", sides[0]), check_side(f"{name} width", sides[1])


def check_side(name: str, side: Any) -> int:
    """Return ``side`` as an int of at least 1; errors call it ``name``."""
    try:
        length = operator.index(side)
    except TypeError:
        length = 0
    if length < 1:
        raise GeometryError(f"{name} must be a whole number of at least 1, got {side!r}")
    return length


def _round(length: float) -> int:
    return math.floor(length + 0.5)  # halves up


def _pairs(values: Tensor, name: str, meaning: str) -> tuple[Tensor, Tensor]:
    if values.ndim == 0 or values.shape[-1] != 2:
        raise GeometryError(
            f"got {name} of shape {tuple(values.shape)}, expected (..., 2) with {meaning} last"
        )
    if not values.is_floating_point():
        # MPS has no float64
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    first, second = values.unbind(-1)
    return first, second
