"""Measures of tracked joints and points: PCK of JHMDB, BADJA's deltas, TAP-Vid's metrics.

A predicted position that is NaN is a miss; a true one that is not finite is an error if it counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cosettle_adapter.correspondence import track_points
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.geometry import Geometry

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
QueryMode = Literal["first", "strided"]

_JOINT_BOX_SHARE = 0.6  # of the diagonal of the joints' box, as the size of a person
_THRESHOLDS = (1, 2, 4, 8, 16)  # of TAP-Vid, in pixels of a 256 x 256 frame


@dataclasses.dataclass(frozen=True, eq=False)
class Pck:
    """Counts of correct joints at K thresholds, which can be added over clips."""

    thresholds: tuple[float, ...]  # shares of the person's size
    correct: NDArray[np.int64]  # (J, K), how often a joint was within a threshold
    total: NDArray[np.int64]  # (J,), how often it counted

    @property
    def mean(self) -> dict[float, float]:
        """PCK by threshold: the mean share over the joints that counted; NaN if none did."""
        known = self.total > 0
        shares = self.correct[known] / self.total[known, None]
        return {
            threshold: float(shares[:, k].mean()) if known.any() else float("nan")
            for k, threshold in enumerate(self.thresholds)
        }

    def __add__(self, other: Pck) -> Pck:
        """Pool two clips: a joint's share is over all frames, so long clips weigh more."""
        if self.thresholds != other.thresholds or self.total.shape != other.total.shape:
            raise ValueError("cannot pool counts of other joints or at other thresholds")
        return Pck(self.thresholds, self.correct + other.correct, self.total + other.total)


def pck(
    gt: ArrayLike,
    pred: ArrayLike,
    thresholds: Sequence[float] = (0.1, 0.2),
    *,
    visible: ArrayLike | None = None,
) -> Pck:
    """Count the joints of a clip whose distance from the truth is within shares of the person.

    This is the measure on JHMDB of videowalk and later work. The person's size is 0.6 * the
    diagonal of the box of a frame's visible joints; joints of a frame of size 0 are missed. The
    first frame, which is given, does not count. Each joint's share is pooled over all frames of
    all clips, and PCK is the mean of the 15 shares. As in the published code, "visible" is a
    property of the prediction: a joint whose propagated heat map is empty is left out of the box
    and of the counts.

    Positions are ``(T, J, 2)`` (x, y) pixels, ``visible`` is ``(T, J)`` boolean, by default all.
    Counts add up over clips: ``sum(rest, start=first).mean[0.1]``.
    """
    truth, guess = _positions("(T, J, 2)", gt=gt, pred=pred)
    seen = np.ones(truth.shape[:2], bool) if visible is None else _flags("visible", visible, truth)
    _check_finite("gt", truth, seen)
    low = np.where(seen[..., None], truth, np.inf).min(1)
    high = np.where(seen[..., None], truth, -np.inf).max(1)
    # division as in the published code: 0 / 0 is NaN, which is a miss
    with np.errstate(divide="ignore", invalid="ignore"):
        size = _JOINT_BOX_SHARE * np.linalg.norm(high - low, axis=1)
        relative = np.linalg.norm(guess - truth, axis=2) / size[:, None]
        within = relative[..., None] <= np.asarray(thresholds, dtype=np.float64)
    correct = (within & seen[..., None])[1:].sum(0)
    return Pck(tuple(map(float, thresholds)), correct, seen[1:].sum(0))


class BadjaAccuracy(NamedTuple):
    """Shares of correct joints in one clip; the figure of a data set is the mean over clips."""

    delta_seg: float  # within 0.2 * sqrt(area of the animal's mask), in [0, 1]
    delta_3px: float  # within 3 pixels, in [0, 1]; it depends on the frame size
    positions: int  # number of positions that counted; if 0, both shares are NaN


def badja_accuracy(
    gt: ArrayLike, pred: ArrayLike, visible: ArrayLike, areas: ArrayLike
) -> BadjaAccuracy:
    """Measure the share of an animal's joints that are tracked correctly, by the published rule.

    A position counts if its joint is annotated as visible, except in the clip's first frame. A
    correct distance is strictly below the threshold; all positions of the clip are pooled.

    Positions are ``(T, J, 2)`` (x, y) pixels, ``areas`` ``(T,)`` pixels of the animal's mask,
    ``visible`` ``(T, J)`` boolean; ``T`` are all frames or the annotated ones. Only visible
    positions are read. Mark a joint as invisible until after its query, or if it has none.
    """
    truth, guess = _positions("(T, J, 2)", gt=gt, pred=pred)
    counted = _flags("visible", visible, truth) & (np.arange(len(truth)) > 0)[:, None]
    _check_finite("gt", truth, counted)
    sizes: Floats = np.asarray(areas, dtype=np.float64)
    if sizes.shape != truth.shape[:1]:
        raise FrameError(f"got areas of shape {sizes.shape}, expected (T,) = {truth.shape[:1]}")
    distance = np.linalg.norm(guess - truth, axis=2)[counted]
    area = np.broadcast_to(sizes[:, None], counted.shape)[counted]
    return BadjaAccuracy(
        delta_seg=_share((distance < 0.2 * np.sqrt(area)).sum(), len(distance)),
        delta_3px=_share((distance < 3).sum(), len(distance)),
        positions=len(distance),
    )


class TapVidMetrics(NamedTuple):
    """TAP-Vid's metrics of one video, in [0, 1]; NaN if nothing counts."""

    delta_avg: float  # mean of pts_within
    occlusion_accuracy: float  # OA, share of positions whose occlusion is predicted correctly
    average_jaccard: float  # AJ, mean of jaccard
    pts_within: dict[int, float]  # by threshold, share of visible positions strictly within it
    jaccard: dict[int, float]  # by threshold, true positives / (visible + false positives)


def tapvid_metrics(
    query_points: ArrayLike,
    gt_occluded: ArrayLike,
    gt_tracks: ArrayLike,
    pred_occluded: ArrayLike,
    pred_tracks: ArrayLike,
    mode: QueryMode = "first",
) -> TapVidMetrics:
    """Score the tracked points of one video as TAP-Vid does.

    A benchmark's figure is the mean over all videos in which it is not NaN.

    Queries are ``(Q, 3)`` (t, y, x), of which only t is read; occlusion is ``(Q, T)`` boolean;
    tracks are ``(Q, T, 2)`` (x, y) pixels of a 256 x 256 frame. Mode ``"first"`` counts the frames
    after the query's, ``"strided"`` all frames except the query's.
    """
    if mode not in ("first", "strided"):
        raise ValueError(f"got mode={mode!r}, expected 'first' or 'strided'")
    tracks, guess = _positions("(Q, T, 2)", gt_tracks=gt_tracks, pred_tracks=pred_tracks)
    occluded = _flags("gt_occluded", gt_occluded, tracks)
    guess_occluded = _flags("pred_occluded", pred_occluded, tracks)
    points: Floats = np.asarray(query_points, dtype=np.float64)
    if points.shape != (len(tracks), 3):
        raise FrameError(f"got query_points of shape {points.shape}, expected {(len(tracks), 3)}")
    query, frames = np.round(points[:, :1]), np.arange(tracks.shape[1])
    wrong = query[~((query >= 0) & (query < len(frames)))]
    if len(wrong):
        raise FrameError(
            f"got a query in frame {wrong[0]}, expected 0 to {len(frames) - 1}; query_points are "
            "(t, y, x), the frame first"
        )
    counted = frames > query if mode == "first" else frames != query
    visible, guess_visible = ~occluded & counted, ~guess_occluded & counted
    _check_finite("gt_tracks", tracks, visible)
    squared = ((guess - tracks) ** 2).sum(2)
    within, jaccard = {}, {}
    for threshold in _THRESHOLDS:
        near = visible & (squared < threshold**2)
        false_positives = (guess_visible & ~near).sum()
        within[threshold] = _share(near.sum(), visible.sum())
        jaccard[threshold] = _share((near & guess_visible).sum(), visible.sum() + false_positives)
    return TapVidMetrics(
        delta_avg=float(np.mean(list(within.values()))),
        occlusion_accuracy=_share(((occluded == guess_occluded) & counted).sum(), counted.sum()),
        average_jaccard=float(np.mean(list(jaccard.values()))),
        pts_within=within,
        jaccard=jaccard,
    )


class Queries(NamedTuple):
    """Points to track, each with its annotated track."""

    points: Floats  # (Q, 3) (t, y, x): frame number, then the position in the tracks' units
    occluded: Flags  # (Q, T)
    tracks: Floats  # (Q, T, 2) (x, y)
    track: NDArray[np.int64]  # (Q,) row of the annotated track


def queries_first(occluded: ArrayLike, tracks: ArrayLike) -> Queries:
    """Query every track where it is first visible; tracks that are never visible are left out.

    ``occluded`` is ``(N, T)`` boolean, ``tracks`` ``(N, T, 2)`` (x, y) in any unit.
    """
    (positions,) = _positions("(N, T, 2)", tracks=tracks)
    hidden = _flags("occluded", occluded, positions)
    index = (~hidden).any(1).nonzero()[0]
    return _queries(hidden, positions, index, hidden[index].argmin(1))


def queries_strided(occluded: ArrayLike, tracks: ArrayLike, stride: int = 5) -> Queries:
    """Query every track in each of the frames 0, stride, 2 * stride, ... in which it is visible.

    Arguments are those of :func:`queries_first`; queries are sorted by frame, then by track.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1 frame, got {stride}")
    (positions,) = _positions("(N, T, 2)", tracks=tracks)
    hidden = _flags("occluded", occluded, positions)
    step, index = (~hidden[:, ::stride]).T.nonzero()
    return _queries(hidden, positions, index, step * stride)


def track_queries(
    features: Tensor, frames: Any, points: Tensor, geometry: Geometry, **options: Any
) -> tuple[Tensor, Tensor]:
    """Track points by features ``(T, C, h, w)`` from their query frames to all frames.

    Points are ``(Q, 2)`` (x, y) pixels in ``frames`` ``(Q,)``; one outside is moved to the edge.
    Options are those of :func:`~cosettle_adapter.correspondence.track_points`.

    Returns:
        ``(Q, T, 2)`` float64 (x, y) pixels, and the cycle error ``(Q, T)`` in patches.
    """
    query_frames = torch.as_tensor(frames).long()
    limits = torch.tensor(features.shape[-2:], dtype=torch.float64) - 0.5
    patches = geometry.pixels_to_cells(points.double()).clamp(min=-0.5).minimum(limits)
    xy = torch.zeros(len(query_frames), len(features), 2, dtype=torch.float64)
    error = torch.zeros(len(query_frames), len(features))
    for frame in sorted(set(query_frames.tolist())):
        rows = query_frames == frame
        # each frame is matched with the query's frame alone, so their order does not matter
        maps = (features[index] for index in (frame, *range(len(features))))
        tracks = track_points(maps, patches[rows].to(features.device), **options)
        positions = geometry.cells_to_pixels(tracks.positions[1:].double().cpu())
        xy[rows] = rearrange(positions, "t q two -> q t two")
        error[rows] = rearrange(tracks.cycle_error[1:].float().cpu(), "t q -> q t")
    return xy, error


def _queries(hidden: Flags, positions: Floats, index: Any, frames: Any) -> Queries:
    points = np.column_stack([frames, positions[index, frames][:, ::-1]])
    return Queries(points, hidden[index], positions[index], index)


def _positions(form: str, **values: ArrayLike) -> list[Floats]:
    arrays: list[Floats] = [np.asarray(value, dtype=np.float64) for value in values.values()]
    for name, xy in zip(values, arrays, strict=True):
        if xy.ndim != 3 or xy.shape[2] != 2 or xy.shape != arrays[0].shape:
            raise FrameError(
                f"got {name} of shape {xy.shape}, expected {form}: (x, y) positions, all of one "
                f"shape ({next(iter(values))} has {arrays[0].shape})"
            )
    return arrays


def _flags(name: str, value: ArrayLike, positions: Floats) -> Flags:
    shape = positions.shape[:2]
    flags: Flags = np.asarray(value)
    if flags.shape != shape or flags.dtype != np.bool_:
        raise FrameError(f"got {name} {flags.dtype} {flags.shape}, expected bool {shape}")
    return flags


def _check_finite(name: str, positions: Floats, counted: Flags) -> None:
    if not np.isfinite(positions[counted]).all():
        raise FrameError(
            f"{name} has a position that counts and is not finite; correct it, or mark it as not "
            "visible"
        )


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")
