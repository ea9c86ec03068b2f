"""Measures of temporal consistency: drift, cycles, matches, tracking.

Neither drift nor cycles tell whether features follow the right thing: blurred features drift less
but also make different things alike, and cycles do not use the truth. :func:`match_accuracy` and
:func:`tracking_error` do, on clips of known motion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence import mutual_nearest, track_points
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video.geometry import Geometry
from cosettle_adapter.video.synthetic import RenderedClip

GAPS = (1, 4, 8)  # frames
_CHUNK = 1024  # patches compared at a time
_NEAR = 0.25  # patches; largest offset of a true correspondence from a patch's centre


class Correspondence(NamedTuple):
    """Patches ``(M, 2)`` of two frames, row-major indices, that show the same thing."""

    frames: tuple[int, int]
    patches: Tensor


def mutual_correspondences(guide: Tensor, gap: int) -> list[Correspondence]:
    """Match mutually nearest patches of frames ``gap`` apart, for clips of unknown motion.

    The features ``guide``, ``(T, C, h, w)``, must differ from the features that are measured.
    """
    return [
        Correspondence((t, t + gap), mutual_nearest(guide[t], guide[t + gap])[0])
        for t in range(len(guide) - gap)
    ]


def true_correspondences(clip: RenderedClip, geometry: Geometry, gap: int) -> list[Correspondence]:
    """Match the patches of frames ``gap`` apart that show the same thing by the true motion.

    Both centres are visible, and the first moves to within a quarter of a patch of the second in
    both directions: at an offset of half a patch, features differ even without drift.
    """
    centres = rearrange(geometry.cell_centers(), "h w xy -> (h w) xy")
    rows, columns = geometry.grid
    correspondences = []
    for t in range(len(clip.frames) - gap):
        positions, visible = _two_frames(clip, t, t + gap).track(centres)
        patches = geometry.pixels_to_cells(positions[1])
        near = (patches - patches.round()).abs().amax(-1) <= _NEAR
        row, column = patches.round().long().unbind(-1)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        pairs = torch.stack([torch.arange(len(patches)), row * columns + column], dim=1)
        correspondences.append(Correspondence((t, t + gap), pairs[visible.all(0) & near & inside]))
    return correspondences


def _two_frames(clip: RenderedClip, first: int, second: int) -> RenderedClip:
    """Return two frames as a clip whose motion starts at the first of them."""
    frames = [first, second]

    def since(homographies: Tensor) -> Tensor:
        moved: Tensor = homographies[frames] @ torch.linalg.inv(homographies[first])
        return moved

    two = RenderedClip(clip.frames[frames], since(clip.homographies))
    if clip.object_mask is None or clip.object_homographies is None:
        return two
    moved = since(clip.object_homographies)
    return dataclasses.replace(two, object_mask=clip.object_mask[frames], object_homographies=moved)


@torch.no_grad()
def temporal_drift(features: Tensor, correspondences: Iterable[Correspondence]) -> float:
    """Measure the distance of corresponding patches over the distance of any two patches.

    Distances are cosine distances after the clip's mean token is subtracted from its features
    ``(T, C, h, w)``, so neither scale nor an added constant matters. "Any two" patches are each
    patch of a pair's first frame and a random one (fixed seed) of its second.

    Returns:
        0 if features follow things exactly, about 1 if they are unrelated to them; NaN without
        correspondences, or if all features are equal.
    """
    frames = token_frames(features)
    frames = F.normalize(frames - frames.mean(dim=(0, 1)), dim=-1)
    generator = torch.Generator().manual_seed(0)
    same, any_two = [frames.new_empty(0)], [frames.new_empty(0)]
    for (first, second), patches in correspondences:
        here, there = frames[first], frames[second]
        drawn = torch.randperm(len(there), generator=generator).to(frames.device)
        any_two.append((here - there[drawn]).square().sum(dim=-1))  # twice the cosine distance
        own, other = patches.to(frames.device).unbind(1)
        same.append((here[own] - there[other]).square().sum(dim=-1))
    return float(torch.cat(same).double().mean() / torch.cat(any_two).double().mean())


def drift_by_gap(
    features: Tensor, correspondences: Mapping[int, Sequence[Correspondence]]
) -> dict[str, float]:
    """Return the drift for each gap that has correspondences, as ``drift@<gap>``."""
    return {
        f"drift@{gap}": temporal_drift(features, pairs)
        for gap, pairs in correspondences.items()
        if pairs
    }


@torch.no_grad()
def match_accuracy(features: Tensor, correspondences: Iterable[Correspondence]) -> float:
    """Share of patches whose nearest neighbour is within one patch of the truth; NaN if none."""
    frames, width = F.normalize(token_frames(features), dim=-1), features.shape[-1]
    hits = [torch.empty(0)]
    for (first, second), patches in correspondences:
        own, other = patches.to(frames.device).unbind(1)
        matches = nearest(frames[first][own], frames[second])
        rows = (matches // width - other // width).abs()
        columns = (matches % width - other % width).abs()
        hits.append((torch.maximum(rows, columns) <= 1).float().cpu())
    return float(torch.cat(hits).mean())


@torch.no_grad()
def cycle_consistent(features: Tensor, *, gap: int = 1) -> Tensor:
    """Return which patches are cycle-consistent over ``gap`` frames, ``(T - gap, h, w)`` bool.

    The cycle goes from a patch of frame t to its nearest neighbour (cosine) in frame t + gap and
    to that one's nearest neighbour in frame t (paper, Figure 1). For constant features about
    1 / (h w) of the patches return by chance.
    """
    if gap < 1:
        raise ValueError(f"got gap={gap}, expected at least 1 frame")
    frames = F.normalize(token_frames(features, at_least=gap + 1), dim=-1)
    own = torch.arange(frames.shape[1], device=frames.device)
    maps = [
        nearest(there, here)[nearest(here, there)] == own
        for here, there in zip(frames[:-gap], frames[gap:], strict=True)
    ]
    return rearrange(maps, "t (h w) -> t h w", w=features.shape[-1])


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
    """Measure the error of tracking the points of frame 0 by nearest neighbours.

    Features are ``(T, C, h, w)``, ``geometry`` maps their grid to the frame, points are ``(N, 2)``
    (x, y) pixels of frame 0, ``positions`` ``(T, N, 2)`` their true positions, ``visible``
    ``(T, N)`` bool. Frame 0 and hidden points do not count.

    Returns:
        Errors in pixels, ``mean`` and ``median``; for each of ``thresholds`` in pixels, the share
        of points within it, ``pck@<threshold>``; the ``count`` of measured points.
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
            "got no point that is visible after frame 0, expected at least one; choose points that "
            "stay in view."
        )
    patches = geometry.pixels_to_cells(points.to(features.device))
    tracked = geometry.cells_to_pixels(track_points(features, patches).positions).cpu().double()
    errors = (tracked - positions.cpu().double()).norm(dim=-1)[1:][seen]
    figures = {"mean": float(errors.mean()), "median": float(errors.median())}
    for threshold in thresholds:
        figures[f"pck@{threshold:g}"] = float((errors <= threshold).double().mean())
    return figures | {"count": float(len(errors))}


def token_frames(features: Tensor, *, at_least: int = 1) -> Tensor:
    """Return ``(T, C, h, w)`` as contiguous ``(T, h w, C)``, float32 or float64."""
    if features.ndim != 4 or not features.is_floating_point():
        raise GeometryError(
            f"got features of shape {tuple(features.shape)} and dtype {features.dtype}, expected "
            "floats of shape (T, C, h, w)."
        )
    if len(features) < at_least:
        raise FrameError(f"got {len(features)} frames, expected at least {at_least}.")
    wide = features if features.dtype == torch.float64 else features.float()
    return rearrange(wide, "t c h w -> t (h w) c").contiguous()


def nearest(queries: Tensor, keys: Tensor, offsets: Tensor | float = 0.0) -> Tensor:
    """Return for each query the index of the key with the largest inner product minus offset."""
    parts = torch.split(queries, _CHUNK)
    return torch.cat([(part @ keys.T - offsets).argmax(dim=1) for part in parts])
