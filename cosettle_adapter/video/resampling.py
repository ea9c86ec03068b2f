"""Pixels and features carried along a geometry: frames to the encoder, a grid back to pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video.geometry import Geometry


def apply_geometry(frames: Tensor, geometry: Geometry) -> Tensor:
    """Resize and pad frames as planned.

    Resizing is bicubic with antialiasing, in float32, clamped to the input's range. Padding
    repeats the last row and column. What need not be done is not done: frames that fit already
    come back as they are, the same tensor, and padding alone keeps the dtype.

    Args:
        frames: (T, 3, H, W) uint8 in [0, 255] or float in [0, 1].
        geometry: the plan, made for (H, W).

    Returns:
        (T, 3, H', W') with (H', W') = ``geometry.padded``, in the range of the input: [0, 255]
        for uint8 and [0, 1] for float. float32 if anything was resized.

    Raises:
        GeometryError: the frames are not of the size the geometry was planned for.
    """
    if frames.ndim != 4 or tuple(frames.shape[-2:]) != geometry.frame:
        raise GeometryError(
            f"got frames of shape {tuple(frames.shape)}, but the geometry was planned for "
            f"(T, 3, {geometry.frame[0]}, {geometry.frame[1]}); "
            "call plan_geometry for this frame size"
        )
    if geometry.resized != geometry.frame:
        frames = resize(frames, geometry.resized)
    bottom, right = (p - r for p, r in zip(geometry.padded, geometry.resized, strict=True))
    # torch's replicate padding knows no uint8
    if bottom:
        frames = torch.cat((frames, frames[..., -1:, :].expand(-1, -1, bottom, -1)), dim=-2)
    if right:
        frames = torch.cat((frames, frames[..., -1:].expand(-1, -1, -1, right)), dim=-1)
    return frames


def resample_to_points(features: Tensor, geometry: Geometry, points: Tensor) -> Tensor:
    """Read a feature grid at pixels of the original frame, bilinearly between cell centres.

    Args:
        features: (T, C, h, w) float features on ``geometry.grid``.
        geometry: how the frames became that grid.
        points: (N, 2) or (hh, ww, 2) of (x, y) pixels of the original frame. Points beyond the
            outermost cell centres take the value at the border.

    Returns:
        (T, C, N) or (T, C, hh, ww), in the dtype of ``features``.

    Raises:
        GeometryError: ``features`` is not on the geometry's grid, or ``points`` has another shape
            or holds NaN or infinite values.
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
        raise GeometryError("points hold NaN or infinite values; leave those points out")
    row, down = _between(cells[..., 0], h)
    col, across = _between(cells[..., 1], w)
    corners = (
        (row[0] * w + col[0], (1 - down) * (1 - across)),
        (row[0] * w + col[1], (1 - down) * across),
        (row[1] * w + col[0], down * (1 - across)),
        (row[1] * w + col[1], down * across),
    )
    # a weighted sum of looked-up rows; grid_sample's float32 coordinates are off by 1e-5 of a cell
    precise = torch.float64 if features.dtype == torch.float64 else torch.float32
    table = rearrange(features, "t c h w -> (h w) (t c)").to(precise)
    index = rearrange([corner for corner, _ in corners], "k ... -> (...) k")
    weight = rearrange([share for _, share in corners], "k ... -> (...) k").to(precise)
    sampled = _here_or_on_cpu(_weighted_rows, table, index, weight)
    sampled = rearrange(sampled, "n (t c) -> t c n", t=len(features)).to(features.dtype)
    if points.ndim == 2:
        return sampled
    return rearrange(sampled, "t c (hh ww) -> t c hh ww", hh=len(points))


def resize(frames: Tensor, sides: tuple[int, int]) -> Tensor:
    """Resize (T, C, H, W) frames to ``sides``: float32, bicubic, antialiased, range kept."""

    def bicubic(pixels: Tensor) -> Tensor:
        return F.interpolate(pixels, size=sides, mode="bicubic", antialias=True)

    top = 255.0 if frames.dtype == torch.uint8 else 1.0
    return _here_or_on_cpu(bicubic, frames.to(torch.float32)).clamp_(0.0, top)


def _between(position: Tensor, count: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Indices before and after a position among ``count`` cells, and the share of the latter."""
    position = position.clamp(0, count - 1)
    before = position.floor()
    after = (before + 1).clamp(max=count - 1)
    return (before.long(), after.long()), position - before


def _weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    index, weight = index.to(table.device), weight.to(table.device)
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def _here_or_on_cpu(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Run an operation where its first tensor lives, or on the CPU if no kernel exists there."""
    try:
        return operation(*tensors)
    except NotImplementedError:
        return operation(*(tensor.cpu() for tensor in tensors)).to(tensors[0].device)
