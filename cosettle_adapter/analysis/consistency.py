"""How steadily patch features follow the things they are on, one clip at a time.

Cycle accuracy says what the features do, not whether that is good. :func:`tracking_error` needs
clips whose motion is known, and does say it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.analysis.tokens import best_match, token_frames
from cosettle_adapter.correspondence import track_points
from cosettle_adapter.errors import FrameError, GeometryError

if TYPE_CHECKING:
    from cosettle_adapter.video.geometry import Geometry


@torch.no_grad()
def cycle_accuracy(
    features: Tensor, *, gap: int = 1, tolerance: int = 0, chunk: int = 1024
) -> float:
    """Share of cells that come home when they go to frame t + gap and back.

    A cell of frame t goes to its nearest neighbour by cosine in frame t + gap, and from there to
    the nearest neighbour in frame t. Mean over cells and over all t (Figure 1 of the paper).

    Args:
        features: ``(T, C, h, w)`` floats.
        gap: frames between the two ends.
        tolerance: rows and columns a cell may be off and still count as home.
        chunk: cells compared at a time; bounds memory, does not change the result.

    Returns:
        A share in [0, 1]; features that do not vary give about 1 / (h w).

    Raises:
        GeometryError: features that are not ``(T, C, h, w)`` floats.
        FrameError: no more than ``gap`` frames.
        ValueError: ``gap`` or ``chunk`` below 1, ``tolerance`` below 0.
    """
    return float(comes_home(features, gap=gap, tolerance=tolerance, chunk=chunk).float().mean())


@torch.no_grad()
def comes_home(features: Tensor, *, gap: int = 1, tolerance: int = 0, chunk: int = 1024) -> Tensor:
    """Tell which cells come home: the map whose mean is :func:`cycle_accuracy`.

    Args:
        features: as in :func:`cycle_accuracy`, like the options.
        gap: frames between the two ends.
        tolerance: rows and columns a cell may be off and still count as home.
        chunk: cells compared at a time.

    Returns:
        ``(T - gap, h, w)`` bool on the features' device.

    Raises:
        GeometryError: features that are not ``(T, C, h, w)`` floats.
        FrameError: no more than ``gap`` frames.
        ValueError: an option out of range.
    """
    if gap < 1 or tolerance < 0 or chunk < 1:
        raise ValueError(
            f"got gap={gap}, tolerance={tolerance}, chunk={chunk}; "
            "gap and chunk must be at least 1, tolerance at least 0."
        )
    frames = token_frames(features, at_least=gap + 1)
    width = features.shape[-1]
    own = torch.arange(frames.shape[1], device=frames.device)
    maps = []
    for here, there in zip(frames, frames[gap:], strict=False):
        here, there = F.normalize(here, dim=-1), F.normalize(there, dim=-1)
        home = best_match(there, here, chunk)[best_match(here, there, chunk)]
        rows = (home // width - own // width).abs()
        columns = (home % width - own % width).abs()
        maps.append(torch.maximum(rows, columns) <= tolerance)
    return rearrange(maps, "t (h w) -> t h w", w=width)


@torch.no_grad()
def tracking_error(
    features: Tensor,
    geometry: Geometry,
    points: Tensor,
    positions: Tensor,
    visible: Tensor,
    *,
    thresholds: tuple[float, ...] = (4, 8, 16),
) -> dict[str, float]:
    """How far nearest-neighbour tracking of frame 0's points ends from where they truly are.

    The training-free baseline :func:`~cosettle_adapter.correspondence.track_points`, over the
    whole frame and without memory: what is measured is the features, not a tracker. Frame 0 is
    left out, and so is every point while it is hidden.

    Args:
        features: ``(T, C, h, w)`` floats.
        geometry: how the grid lies on the frame, ``adapter.geometry(H, W)``.
        points: ``(N, 2)`` (x, y) in pixels of frame 0.
        positions: ``(T, N, 2)`` (x, y) in pixels, where the points truly are.
        visible: ``(T, N)`` bool, whether they can be seen.
        thresholds: pixels for the shares of points that are within.

    Returns:
        ``mean`` and ``median`` in pixels of the frame, ``pck@t`` in [0, 1] for each threshold
        ``t``, and ``count`` of the points that were measured.

    Raises:
        GeometryError: shapes that do not fit together.
        FrameError: no point is visible after frame 0.
    """
    token_frames(features, at_least=2)
    expected = (len(features), len(points))
    if visible.shape != expected or positions.shape != (*expected, 2):
        raise GeometryError(
            f"got positions of shape {tuple(positions.shape)} and visible of shape "
            f"{tuple(visible.shape)}, expected {(*expected, 2)} and {expected} for "
            f"{expected[0]} frames and {expected[1]} points."
        )
    seen = visible[1:].bool().cpu()
    if not seen.any():
        raise FrameError(
            "got no point that is visible after frame 0, so there is nothing to measure. "
            "Choose points that stay in view."
        )
    cells = geometry.pixels_to_cells(points.to(features.device))
    found = geometry.cells_to_pixels(track_points(features, cells).positions).cpu().double()
    errors = (found - positions.cpu().double()).norm(dim=-1)[1:][seen]
    figures = {"mean": float(errors.mean()), "median": float(errors.median())}
    for threshold in thresholds:
        figures[f"pck@{threshold:g}"] = float((errors <= threshold).double().mean())
    return figures | {"count": float(len(errors))}
