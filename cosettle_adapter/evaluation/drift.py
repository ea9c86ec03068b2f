"""How far the features of one and the same thing move over time: temporal drift.

Drift falls when features are blurred, which also makes different things alike; so
:func:`match_accuracy` is reported with it wherever the true motion is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence import mutual_nearest
from cosettle_adapter.evaluation.consistency import nearest_patch, token_frames
from cosettle_adapter.video.synthetic import RenderedClip

if TYPE_CHECKING:
    from cosettle_adapter.video.geometry import Geometry

GAPS = (1, 4, 8)  # frames
_NEAR = 0.25  # patches
_SEED = 0


class Correspondence(NamedTuple):
    """Which patches of two frames show the same thing.

    Attributes:
        frames: the two frames' indices.
        patches: ``(M, 2)`` int64, row-major indices of patches in the first and second frame.
    """

    frames: tuple[int, int]
    patches: Tensor


def mutual_correspondences(guide: Tensor, gap: int) -> list[Correspondence]:
    """Take the patches that are each other's nearest neighbour, for clips of unknown motion.

    Args:
        guide: ``(T, C, h, w)`` features to match by cosine. They must not be the features that
            are measured, which would be judged where they agree with themselves.
        gap: frames between the two; one correspondence for every such pair of frames.
    """
    return [
        Correspondence((t, t + gap), mutual_nearest(guide[t], guide[t + gap])[0])
        for t in range(len(guide) - gap)
    ]


def true_correspondences(clip: RenderedClip, geometry: Geometry, gap: int) -> list[Correspondence]:
    """Take the patches that truly show the same: a point visible at the centre of both.

    That is, the patches of the first frame whose centre comes within a quarter of a patch, in both
    directions, of a centre of the second. Half a patch off, features differ whether or not they
    drift.

    Args:
        clip: a clip of known motion.
        geometry: how its frames became the grid of patches.
        gap: frames between the two; one correspondence for every such pair of frames.
    """
    centres = rearrange(geometry.cell_centers(), "h w xy -> (h w) xy")
    rows, columns = geometry.grid
    found = []
    for t in range(len(clip.frames) - gap):
        positions, visible = _pair(clip, t, t + gap).track(centres)
        patches = geometry.pixels_to_cells(positions[1])
        near = (patches - patches.round()).abs().amax(-1) <= _NEAR
        row, column = patches.round().long().unbind(-1)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        pairs = torch.stack([torch.arange(len(patches)), row * columns + column], dim=1)
        found.append(Correspondence((t, t + gap), pairs[visible.all(0) & near & inside]))
    return found


def _pair(clip: RenderedClip, first: int, second: int) -> RenderedClip:
    """Two frames as a clip, in which the first of them is frame 0."""
    frames = [first, second]

    def since(homographies: Tensor) -> Tensor:
        moved: Tensor = homographies[frames] @ torch.linalg.inv(homographies[first])
        return moved

    mask, moving = clip.object_mask, clip.object_homographies
    return RenderedClip(
        clip.frames[frames],
        since(clip.homographies),
        None if mask is None else mask[frames],
        None if moving is None else since(moving),
    )


@torch.no_grad()
def temporal_drift(features: Tensor, correspondences: Iterable[Correspondence]) -> float:
    """Distance of patches that correspond, over the distance of any two patches.

    Distances are cosine distances after the clip's mean token is subtracted, so the measure does
    not change with the features' scale or a constant added to them, and patches with long features
    do not count for more. Where features are a constant part and independent noise, it is the
    noise's share of the variance. "Any two": each patch of a pair's first frame and one drawn at
    random (fixed seed) from its second. Means are over all patches of all pairs of frames.

    Args:
        features: ``(T, C, h, w)`` floats.
        correspondences: pairs of frames and patches, on the same grid.

    Returns:
        0 where features stay with things, about 1 where they have nothing to do with them; NaN
        without a correspondence, or where all features are equal.
    """
    frames = token_frames(features, at_least=1)
    frames = F.normalize(frames - frames.mean(dim=(0, 1)), dim=-1)
    generator = torch.Generator().manual_seed(_SEED)
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
    """Share of patches whose nearest neighbour by cosine lies within one patch of the truth.

    Args:
        features: ``(T, C, h, w)`` floats.
        correspondences: true ones, on the same grid. Without any the share is NaN.
    """
    frames = F.normalize(token_frames(features, at_least=1), dim=-1)
    width = features.shape[-1]
    hits = [torch.empty(0)]
    for (first, second), patches in correspondences:
        own, other = patches.to(frames.device).unbind(1)
        found = nearest_patch(frames[first][own], frames[second])
        down = (found // width - other // width).abs()
        right = (found % width - other % width).abs()
        hits.append((torch.maximum(down, right) <= 1).float().cpu())
    return float(torch.cat(hits).mean())
