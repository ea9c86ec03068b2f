"""Pixel-dense features: from one vector per patch to one per pixel, a tile at a time.

``bilinear`` interpolates between the centres of patches. ``guided`` is joint bilateral upsampling
(Kopf, Cohen, Lischinski & Uyttendaele, SIGGRAPH 2007): a pixel's feature is the mean over the 5 x 5
nearest patches, weighted by distance and by similarity of colour, so that features follow the edges
of the frame::

    y(p) = sum_q w(p, q) x(q) / sum_q w(p, q)
    w(p, q) = exp(-|p - q|^2 / (2 * 0.5^2)) exp(-|I(p) - I(q)|^2 / (2 * 0.1^2))

Distances are in patches; I(p) is the colour of the pixel and I(q) the mean colour of the patch, RGB
in [0, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video.geometry import Geometry, apply_geometry, as_sides, resize

Upsampler = Literal["bilinear", "guided"]
DenseSize = tuple[int, int] | Literal["input"]

# parameters of guided upsampling, as in the paper
RADIUS = 2  # patches: a neighbourhood of 5 x 5
DISTANCE = 0.5  # patches, standard deviation
COLOUR = 0.1  # of [0, 1], standard deviation

_TILE = 4  # patches a side


@torch.no_grad()
def upsample(
    features: Tensor,
    geometry: Geometry,
    size: DenseSize,
    frames: Tensor | None = None,
    upsampler: Upsampler = "bilinear",
    normalize: bool = False,
    *,
    tile: int = _TILE,
) -> Tensor:
    """Return one feature per pixel, ``(T, C, H, W)`` in the dtype of ``features``, no gradients.

    Beyond the centres of the outermost patches, features keep their value at the border. Besides
    the result, memory holds one tile in float32: for each of its T (tile H / h) (tile W / w)
    pixels C channels and a few copies of ``(tile + 4)^2`` weights. ``guided`` also holds the frames
    in float32.

    Args:
        features: ``(T, C, h, w)`` on the grid of ``geometry``.
        geometry: how the frames became the grid of patches.
        size: ``(H, W)`` of the result, which spans the frame, or ``"input"`` for the frame's own.
        frames: ``(T, 3, H', W')`` of the size in ``geometry``, RGB, uint8 in [0, 255] or floating
            point in [0, 1]; only for ``guided``.
        upsampler: ``"bilinear"`` or ``"guided"`` by the frames.
        normalize: scale every pixel's feature to unit length.
        tile: side of a tile in patches; bounds memory only.

    Raises:
        GeometryError: features, frames or size do not fit the geometry.
        ValueError: unknown upsampler, or ``guided`` without frames.
    """
    if features.ndim != 4 or tuple(features.shape[-2:]) != geometry.grid:
        raise GeometryError(
            f"got features of shape {tuple(features.shape)}, expected (T, C, h, w) with the grid "
            f"{geometry.grid} of this geometry"
        )
    if upsampler not in get_args(Upsampler) or (upsampler == "guided" and frames is None):
        without = " without frames" if frames is None else ""
        raise ValueError(
            f"got upsampler={upsampler!r}{without}, expected 'bilinear', or 'guided' with frames"
        )
    sides = geometry.frame if size == "input" else as_sides("dense (a size, or 'input')", size)
    colours = None
    if upsampler == "guided" and frames is not None:
        if len(frames) != len(features):
            raise GeometryError(
                f"got {len(frames)} frames for the features of {len(features)}; pass the frames "
                "that were encoded"
            )
        colours = _colours(frames.to(features.device), geometry, sides)
    dense = features.new_empty((*features.shape[:2], *sides))
    axes = (_tiles(geometry, axis, sides[axis], tile, features.device) for axis in (0, 1))
    for (rows, near_rows, down), (columns, near_columns, across) in itertools.product(*axes):
        here, near = (..., rows, columns), (..., near_rows, near_columns)
        if colours is None:
            weights = _linear(down, across)
        else:
            pixels, patches = colours
            weights = _bilateral(down, across, pixels[here], patches[near])
        means = einsum(weights, features[near].float(), "t y x a b, t c a b -> t c y x")
        dense[here] = F.normalize(means, dim=1) if normalize else means
    return dense


def _tiles(
    geometry: Geometry, axis: int, side: int, tile: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Split an axis into pixels, the patches they need, and distances ``(pixels, patches)``."""
    pixels = (torch.arange(side, dtype=torch.float64) + 0.5) * (geometry.frame[axis] / side)
    cells = geometry.pixels_to_cells(torch.stack((pixels, pixels), dim=-1))[:, axis]
    count = geometry.grid[axis]
    cells = cells.clamp(0, count - 1)
    for first in range(0, count, tile):
        ends = cells.new_tensor([first - 0.5, first + tile - 0.5])
        start, stop = torch.searchsorted(cells, ends).tolist()
        low, high = max(0, first - RADIUS), min(count, first + tile + RADIUS)
        if start < stop:
            distances = rearrange(cells[start:stop], "p -> p 1") - torch.arange(low, high)
            yield slice(start, stop), slice(low, high), distances.float().to(device)


def _colours(frames: Tensor, geometry: Geometry, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Colours in [0, 1] of pixels ``(T, 3, H, W)`` and patches ``(T, 3, h, w)``."""
    scale = 1.0 if frames.is_floating_point() else 255.0
    patches = F.avg_pool2d(
        apply_geometry(frames, geometry).float(), geometry.patch, geometry.stride
    )
    pixels = frames if sides == geometry.frame else resize(frames, sides)
    return pixels.float() / scale, patches / scale


def _linear(down: Tensor, across: Tensor) -> Tensor:
    """Weights ``(1, y, x, a, b)`` of patches at distances ``(y, a)`` and ``(x, b)``."""
    rows, columns = ((1 - distance.abs()).clamp(min=0) for distance in (down, across))
    return rearrange(einsum(rows, columns, "y a, x b -> y x a b"), "... -> 1 ...")


def _bilateral(down: Tensor, across: Tensor, pixels: Tensor, patches: Tensor) -> Tensor:
    """Weights ``(T, y, x, a, b)`` of patches at distances ``(y, a)`` and ``(x, b)``."""
    rows, columns = (  # exponents, minus infinity beyond the nearest patches
        (distance.square() / (-2 * DISTANCE**2)).masked_fill_(
            distance.abs() >= RADIUS + 0.5, -torch.inf
        )
        for distance in (down, across)
    )
    near = rearrange(rows, "y a -> y 1 a 1") + rearrange(columns, "x b -> x 1 b")
    colours = torch.cdist(
        rearrange(pixels, "t c y x -> t (y x) c"),
        rearrange(patches, "t c a b -> t (a b) c"),
        compute_mode="donot_use_mm_for_euclid_dist",  # exact, unlike the matrix product
    )
    exponents = rearrange(near, "y x a b -> (y x) (a b)") - colours.square() / (2 * COLOUR**2)
    weights = torch.softmax(exponents, dim=-1)
    sides = {"y": len(down), "b": across.shape[1]}
    return rearrange(weights, "t (y x) (a b) -> t y x a b", **sides)
