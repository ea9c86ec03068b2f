"""How far the features of one and the same thing move over time: temporal drift.

Drift falls when features are blurred, which also makes different things alike; so
:func:`match_accuracy` stands beside it wherever the true motion is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.analysis.tokens import best_match, token_frames
from cosettle_adapter.correspondence import mutual_nearest
from cosettle_adapter.video.rendered import RenderedClip

if TYPE_CHECKING:
    from cosettle_adapter.video.geometry import Geometry

GAPS = (1, 4, 8)  # frames
_CHUNK = 1024
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
        guide: ``(T, C, h, w)`` features to match by cosine: not those that will be measured, or
            they are measured where they agree with themselves.
        gap: frames between the two.

    Returns:
        One for every pair of frames; none for a clip of ``gap`` frames or fewer.
    """
    return [
        Correspondence((t, t + gap), mutual_nearest(guide[t], guide[t + gap])[0])
        for t in range(len(guide) - gap)
    ]


def true_correspondences(clip: RenderedClip, geometry: Geometry, gap: int) -> list[Correspondence]:
    """Take the patches that truly show the same: a point visible at the centre of both.

    Args:
        clip: a clip of known motion.
        geometry: how its frames became the grid of patches.
        gap: frames between the two.

    Returns:
        One for every pair of frames: the patches of the first whose centre comes within a quarter
        of a patch, in both directions, of a centre of the second. Half a patch off, features
        differ whether or not they drift.
    """
    centres = rearrange(geometry.cell_centers(), "h w xy -> (h w) xy")
    rows, columns = geometry.grid
    found = []
    for t in range(len(clip.frames) - gap):
        positions, visible = _between(clip, t, t + gap).track(centres)
        cells = geometry.pixels_to_cells(positions[1])
        near = (cells - cells.round()).abs().amax(-1) <= _NEAR
        row, column = cells.round().long().unbind(-1)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        pairs = torch.stack([torch.arange(len(cells)), row * columns + column], dim=1)
        found.append(Correspondence((t, t + gap), pairs[visible.all(0) & near & inside]))
    return found


def _between(clip: RenderedClip, first: int, second: int) -> RenderedClip:
    """Two frames as a clip, in which the first of them is frame 0."""
    frames = [first, second]

    def since(homographies: Tensor) -> Tensor:
        moved: Tensor = homographies[frames] @ torch.linalg.inv(homographies[first])
        return moved

    if clip.object_mask is None or clip.object_homographies is None:
        return RenderedClip(clip.frames[frames], since(clip.homographies))
    return RenderedClip(
        clip.frames[frames],
        since(clip.homographies),
        clip.object_mask[frames],
        since(clip.object_homographies),
    )


@torch.no_grad()
def temporal_drift(features: Tensor, correspondences: Iterable[Correspondence]) -> float:
    """Distance of patches that correspond, over the distance of any two patches.

    Distances are cosine distances after the clip's mean token is taken off, so the measure changes
    neither with the features' scale nor with a constant added to them, and no patch counts for
    more because its features are long. Where features are a constant part and independent noise,
    it is the noise's share of the variance. "Any two": each patch of a pair's first frame and one
    drawn at random (fixed seed) from its second. Means are over all patches of all pairs of frames.

    Args:
        features: ``(T, C, h, w)`` floats.
        correspondences: pairs of frames and patches, on the same grid.

    Returns:
        0 where features stay with things, about 1 where they have nothing to do with them; NaN
        without a correspondence, or where all features are equal.

    Raises:
        GeometryError: features that are not ``(T, C, h, w)`` floats.
    """
    frames = token_frames(features, at_least=1)
    frames = F.normalize(frames - frames.mean(dim=(0, 1)), dim=-1)
    generator = torch.Generator().manual_seed(_SEED)
    same, any_two = [frames.new_empty(0)], [frames.new_empty(0)]
    for (first, second), patches in correspondences:
        here, there = frames[first], frames[second]
        drawn = torch.randperm(len(there), generator=generator).to(frames.device)
        any_two.append((here - there[drawn]).square().sum(dim=-1))  # twice the cosine distance
        matched = patches.to(frames.device)
        same.append((here[matched[:, 0]] - there[matched[:, 1]]).square().sum(dim=-1))
    return float(torch.cat(same).double().mean() / torch.cat(any_two).double().mean())


@torch.no_grad()
def match_accuracy(features: Tensor, correspondences: Iterable[Correspondence]) -> float:
    """Share of patches whose nearest neighbour by cosine lies within one patch of the truth.

    Args:
        features: ``(T, C, h, w)`` floats.
        correspondences: true ones, on the same grid.

    Returns:
        A share in [0, 1], over all correspondences; NaN without one.

    Raises:
        GeometryError: features that are not ``(T, C, h, w)`` floats.
    """
    frames = F.normalize(token_frames(features, at_least=1), dim=-1)
    width = features.shape[-1]
    hits = [torch.empty(0)]
    for (first, second), patches in correspondences:
        matched = patches.to(frames.device)
        found = best_match(frames[first][matched[:, 0]], frames[second], _CHUNK)
        down = found // width - matched[:, 1] // width
        right = found % width - matched[:, 1] % width
        hits.append((torch.maximum(down.abs(), right.abs()) <= 1).float().cpu())
    return float(torch.cat(hits).mean())


def guide_layer(depth: int, read: Iterable[int]) -> int:
    """Choose the layer whose matches stand for the truth where the motion is unknown.

    Args:
        depth: number of layers.
        read: layers that should not judge: what is measured reads them, or matches by them.

    Returns:
        The one nearest two thirds of the depth that is not read (of all, where all are read), the
        later of two equally near.
    """
    free = sorted(set(range(depth)) - set(read), reverse=True)
    return min(free or range(depth), key=lambda layer: abs(3 * (layer + 1) - 2 * depth))


def drift_by_gap(
    features: Tensor, correspondences: Mapping[int, Sequence[Correspondence]]
) -> dict[str, float]:
    """Return the drift for each gap that has correspondences, as ``drift@<gap>``."""
    return {
        f"drift@{gap}": temporal_drift(features, pairs)
        for gap, pairs in correspondences.items()
        if pairs
    }
