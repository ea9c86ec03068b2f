"""How consistently patch features follow things, one clip at a time.

Cycle accuracy needs no truth, so it cannot say whether features follow the right thing;
:func:`tracking_error` needs clips of known motion, and can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence import track_points
from cosettle_adapter.errors import FrameError, GeometryError

if TYPE_CHECKING:
    from cosettle_adapter.video.geometry import Geometry

_CHUNK = 1024  # patches compared at a time


def token_frames(features: Tensor, *, at_least: int) -> Tensor:
    """Return ``(T, C, h, w)`` as contiguous ``(T, h w, C)``, float32 or float64.

    Raises:
        GeometryError: features of another shape or dtype.
        FrameError: fewer frames than ``at_least``.
    """
    if features.ndim != 4 or not features.is_floating_point():
        raise GeometryError(
            f"got features of shape {tuple(features.shape)} and dtype {features.dtype}, expected "
            "floats of shape (T, C, h, w)."
        )
    if len(features) < at_least:
        raise FrameError(f"got {len(features)} frames, expected at least {at_least}.")
    wide = features if features.dtype == torch.float64 else features.float()
    return rearrange(wide, "t c h w -> t (h w) c").contiguous()


def nearest_patch(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the index of the key with the largest inner product, for each query ``(N, C)``."""
    return torch.cat([(block @ keys.T).argmax(dim=1) for block in torch.split(queries, _CHUNK)])


@torch.no_grad()
def cycle_accuracy(features: Tensor, *, gap: int = 1, tolerance: int = 0) -> float:
    """Share of patches, in [0, 1], that :func:`cycle_consistent` is true for (paper, Figure 1).

    Features that do not vary give about 1 / (h w).
    """
    return float(cycle_consistent(features, gap=gap, tolerance=tolerance).float().mean())


@torch.no_grad()
def cycle_consistent(features: Tensor, *, gap: int = 1, tolerance: int = 0) -> Tensor:
    """Tell which patches come home in a cycle from frame t to t + gap and back.

    A patch of frame t goes to its nearest neighbour by cosine in frame t + gap, and from there to
    the nearest neighbour in frame t.

    Args:
        features: ``(T, C, h, w)`` floats, more than ``gap`` frames.
        gap: frames between the two ends, at least 1.
        tolerance: rows and columns a patch may be off and still count as home.

    Returns:
        ``(T - gap, h, w)`` bool on the features' device.
    """
    if gap < 1 or tolerance < 0:
        raise ValueError(
            f"got gap={gap} and tolerance={tolerance}, expected gap >= 1 and tolerance >= 0"
        )
    frames = F.normalize(token_frames(features, at_least=gap + 1), dim=-1)
    width = features.shape[-1]
    own = torch.arange(frames.shape[1], device=frames.device)
    maps = []
    for here, there in zip(frames, frames[gap:], strict=False):
        home = nearest_patch(there, here)[nearest_patch(here, there)]
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

    Tracks with :func:`~cosettle_adapter.correspondence.track_points`, over the whole frame and
    without memory. Frame 0 does not count, nor does a point while it is hidden.

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
    patches = geometry.pixels_to_cells(points.to(features.device))
    found = geometry.cells_to_pixels(track_points(features, patches).positions).cpu().double()
    errors = (found - positions.cpu().double()).norm(dim=-1)[1:][seen]
    figures = {"mean": float(errors.mean()), "median": float(errors.median())}
    for threshold in thresholds:
        figures[f"pck@{threshold:g}"] = float((errors <= threshold).double().mean())
    return figures | {"count": float(len(errors))}
