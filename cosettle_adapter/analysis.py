"""What a projection changed: how steadily patch features follow the things they are on.

The first two measures are those of the paper's Figure 1 (Co-Settle, arXiv:2603.26597), as its
released ``cal_metric`` code defines them, taken here on patch tokens alone whatever the backbone.
They say what the features do, not whether that is good: a constant feature has no neighbouring
distance at all. :func:`tracking_error` needs clips whose motion is known, and does say it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence import track_points
from cosettle_adapter.errors import FrameError, GeometryError

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.frames.geometry import Geometry

RAW_LAST = "raw last block"
RAW_SAME = "raw same block"
CENTRED = "centred"
ADAPTED = "adapted"


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
    if gap < 1 or tolerance < 0 or chunk < 1:
        raise ValueError(
            f"got gap={gap}, tolerance={tolerance}, chunk={chunk}; "
            "gap and chunk must be at least 1, tolerance at least 0."
        )
    frames = _token_frames(features, at_least=gap + 1)
    width = features.shape[-1]
    own = torch.arange(frames.shape[1], device=frames.device)
    shares = []
    for here, there in zip(frames, frames[gap:], strict=False):
        here, there = F.normalize(here, dim=-1), F.normalize(there, dim=-1)
        home = _best(there, here, chunk)[_best(here, there, chunk)]
        rows = (home // width - own // width).abs()
        columns = (home % width - own % width).abs()
        shares.append((torch.maximum(rows, columns) <= tolerance).float().mean())
    return float(torch.stack(shares).mean())


@torch.no_grad()
def neighbour_distance(
    features: Tensor, *, keep: float = 0.5, percentile: float = 95.0, chunk: int = 1024
) -> float:
    """Distance from each patch to its nearest patch in the next frame, in clip diameters.

    D_intra of the paper's Figure 1: Euclidean distances, of which the closest share ``keep`` of
    every pair of frames counts (the others may be occluded or gone), mean over patches and
    pairs. The diameter is twice the ``percentile`` of the patches' distance from the clip's mean
    patch, so the measure does not change when features are scaled or shifted.

    Args:
        features: ``(T, C, h, w)`` floats.
        keep: share of the patches that counts, in (0, 1].
        percentile: percentile of the radius, in (0, 100].
        chunk: cells compared at a time; bounds memory, does not change the result.

    Returns:
        A share of the diameter: 0 for a clip that stands still. NaN when all patches are equal
        and there is no diameter.

    Raises:
        GeometryError: features that are not ``(T, C, h, w)`` floats.
        FrameError: fewer than two frames.
        ValueError: ``keep``, ``percentile`` or ``chunk`` out of range.
    """
    if not (0 < keep <= 1 and 0 < percentile <= 100 and chunk >= 1):
        raise ValueError(
            f"got keep={keep}, percentile={percentile}, chunk={chunk}; expected keep in (0, 1], "
            "percentile in (0, 100] and chunk of at least 1."
        )
    frames = _token_frames(features, at_least=2)
    frames = frames - frames.mean(dim=(0, 1))
    kept = max(1, round(keep * frames.shape[1]))
    distances = []
    for here, there in pairwise(frames):
        nearest = there[_nearest_euclidean(here, there, chunk)]
        # measured anew: a distance read off the matrix product is far from 0 for equal patches
        distance = (here - nearest).norm(dim=-1)
        distances.append(distance.sort().values[:kept].mean())
    radius = rearrange(frames.norm(dim=-1), "t n -> (t n)")
    rank = max(1, round(percentile / 100 * len(radius)))
    return float(torch.stack(distances).mean() / (2 * radius.kthvalue(rank).values))


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
    _token_frames(features, at_least=2)
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


def compare_features(
    adapter: CoSettleAdapter,
    frames: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    on_frames: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return a clip's adapted features and what they must be compared with.

    Most of what a projection seems to gain over the last block can come from reading another
    block, or from no longer carrying the mean token; so both stand beside it. All are read in one
    pass of the backbone.

    Args:
        adapter: backbone and projection.
        frames: ``(T, 3, H, W)`` uint8.
        size: what frames are resized to, as in the adapter's ``forward``.
        batch_size: frames a forward pass.
        on_frames: called with the number of frames done, after each pass.

    Returns:
        ``(T, C, h, w)`` float32 on the CPU for each of ``raw last block``, ``raw same block``
        (the blocks that the projection reads; left out when that is the last block),
        ``centred`` (those minus the clip's mean token) and ``adapted``.
    """
    last: list[Tensor] = []
    same: list[Tensor] = []
    adapted: list[Tensor] = []
    done = 0
    for batch in torch.split(frames, batch_size):
        final, read = _read_blocks(adapter, adapter.preprocess(batch, size=size))
        last.append(final.float().cpu())
        same.append(read.float().cpu())
        with torch.no_grad():
            adapted.append(adapter.projection(read).float().cpu())
        done += len(batch)
        if on_frames is not None:
            on_frames(done)
    raw_last, raw_same = torch.cat(last), torch.cat(same)
    variants = {RAW_LAST: raw_last}
    if raw_same.shape != raw_last.shape or not torch.equal(raw_same, raw_last):
        variants[RAW_SAME] = raw_same
    variants[CENTRED] = raw_same - raw_same.mean(dim=(0, 2, 3), keepdim=True)
    variants[ADAPTED] = torch.cat(adapted)
    return variants


def _read_blocks(adapter: CoSettleAdapter, images: Tensor) -> tuple[Tensor, Tensor]:
    """Last block's tokens, and those the projection reads, ``(B, C, h, w)``; one pass if it can."""
    backbone, config = adapter.backbone, adapter.config
    final = backbone.depth - 1
    usual = [backbone.block(layer) == final and backbone.row.final_norm for layer in config.layers]
    if all(norm == config.norm for norm in usual):
        *read, last = backbone.intermediate_tokens(images, (*config.layers, final))
    else:
        read = backbone.intermediate_tokens(images, config.layers, norm=config.norm)
        last = backbone.patch_tokens(images)
    return last, torch.cat(read, dim=1)


def _token_frames(features: Tensor, *, at_least: int) -> Tensor:
    """``(T, h w, C)`` float32 or wider."""
    if features.ndim != 4 or not features.is_floating_point():
        raise GeometryError(
            f"got features of shape {tuple(features.shape)} and dtype {features.dtype}, expected "
            "floats of shape (T, C, h, w)."
        )
    if len(features) < at_least:
        raise FrameError(f"got {len(features)} frames, expected at least {at_least}.")
    wide = features if features.dtype == torch.float64 else features.float()
    return rearrange(wide, "t c h w -> t (h w) c")


def _best(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Index of the key with the largest inner product, for each query."""
    return torch.cat([(block @ keys.T).argmax(dim=1) for block in torch.split(queries, chunk)])


def _nearest_euclidean(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Index of the nearest key, for each query."""
    offsets = keys.square().sum(dim=-1) / 2
    chunks = torch.split(queries, chunk)
    return torch.cat([(block @ keys.T - offsets).argmax(dim=1) for block in chunks])
