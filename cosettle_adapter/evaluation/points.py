"""Measures of tracked joints and points: PCK as on JHMDB, BADJA's deltas, TAP-Vid's figures.

A predicted position that is not a number is a miss; a true one, where it counts, is an error.
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

_JOINT_BOX_SHARE = 0.6  # of the diagonal of the joints' box: a stand-in for the person's size
_THRESHOLDS = (1, 2, 4, 8, 16)  # of TAP-Vid, in pixels of a 256 x 256 frame


@dataclasses.dataclass(frozen=True, eq=False)
class Pck:
    """How many joints were found at K thresholds, in a form that adds up over clips."""

    thresholds: tuple[float, ...]  # shares of the scale
    correct: NDArray[np.int64]  # (J, K), how often a joint lay within a threshold
    total: NDArray[np.int64]  # (J,), how often it counted

    @property
    def mean(self) -> dict[float, float]:
        """PCK by threshold: the mean over joints that counted, each joint once."""
        known = self.total > 0
        shares = self.correct[known] / self.total[known, None]
        return {
            threshold: float(shares[:, k].mean()) if known.any() else float("nan")
            for k, threshold in enumerate(self.thresholds)
        }

    def __add__(self, other: Pck) -> Pck:
        """Pool two clips: a joint's share is over all its frames, long clips count for more."""
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
    """Count the joints of a clip that are within shares of the person's size of the truth.

    This is the JHMDB measure of videowalk and all who follow it: the size is 0.6 * the diagonal of
    the box of a frame's visible joints (0 counts as missed), the first frame, which is given, does
    not count, every joint's share is pooled over all frames of all clips, and PCK is the mean of
    the 15 shares. As in the published code, "visible" is a property of the prediction: a joint
    whose propagated heat map is empty everywhere is left out of the box and of the counts.

    Positions are ``(T, J, 2)`` (x, y) pixels, ``visible`` is ``(T, J)`` boolean, by default all.
    Counts add up over clips: ``sum(rest, start=first).mean[0.1]``.
    """
    truth, guess = _positions("(T, J, 2)", gt=gt, pred=pred)
    seen = np.ones(truth.shape[:2], bool) if visible is None else _flags("visible", visible, truth)
    _check_finite("gt", truth, seen)
    low = np.where(seen[..., None], truth, np.inf).min(1)
    high = np.where(seen[..., None], truth, -np.inf).max(1)
    # the published code divides, so that 0 / 0, which is not a number, is a miss
    with np.errstate(divide="ignore", invalid="ignore"):
        size = _JOINT_BOX_SHARE * np.linalg.norm(high - low, axis=1)
        relative = np.linalg.norm(guess - truth, axis=2) / size[:, None]
        within = relative[..., None] <= np.asarray(thresholds, dtype=np.float64)
    correct = (within & seen[..., None])[1:].sum(0)
    return Pck(tuple(map(float, thresholds)), correct, seen[1:].sum(0))


class BadjaAccuracy(NamedTuple):
    """Share of joints found in one clip; a data set's figure is the mean over its clips."""

    delta_seg: float  # within 0.2 * sqrt(area of the animal's mask), in [0, 1]
    delta_3px: float  # within 3 pixels; it depends on the frame size
    positions: int  # how many counted; where it is 0, both shares are NaN


def badja_accuracy(
    gt: ArrayLike, pred: ArrayLike, visible: ArrayLike, areas: ArrayLike
) -> BadjaAccuracy:
    """Share of an animal's joints that were tracked well, by the published rule.

    A position counts where the joint is annotated as visible, in every frame but the first of the
    clip; distances are strictly below the threshold, and all positions of the clip are pooled.

    Positions are ``(T, J, 2)`` (x, y) pixels, ``areas`` ``(T,)`` those of the animal's mask, of
    all frames or the annotated ones; both are read where ``visible``, ``(T, J)`` boolean. Mark
    joints as invisible that were never queried, or not yet.
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
    """TAP-Vid's figures of one video, in [0, 1]; NaN where nothing is there to be counted."""

    delta_avg: float  # mean of pts_within
    occlusion_accuracy: float  # OA, share of positions whose occlusion is predicted rightly
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

    A benchmark's figure is the mean over videos in which it is not NaN.

    Queries are ``(Q, 3)`` (t, y, x), of which only t is read, occlusion is ``(Q, T)`` boolean,
    tracks are ``(Q, T, 2)`` (x, y) pixels of a 256 x 256 frame, which the thresholds belong to.
    Mode ``"first"`` counts the frames after the query's, ``"strided"`` all but the query's.
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
        found = visible & (squared < threshold**2)
        false_positives = (guess_visible & ~found).sum()
        within[threshold] = _share(found.sum(), visible.sum())
        jaccard[threshold] = _share((found & guess_visible).sum(), visible.sum() + false_positives)
    return TapVidMetrics(
        delta_avg=float(np.mean(list(within.values()))),
        occlusion_accuracy=_share(((occluded == guess_occluded) & counted).sum(), counted.sum()),
        average_jaccard=float(np.mean(list(jaccard.values()))),
        pts_within=within,
        jaccard=jaccard,
    )


class Queries(NamedTuple):
    """Points to ask for, each with the track it belongs to."""

    points: Floats  # (Q, 3) (t, y, x): frame number, then the position in the tracks' units
    occluded: Flags  # (Q, T)
    tracks: Floats  # (Q, T, 2) (x, y)
    track: NDArray[np.int64]  # (Q,) row of the annotated track that the query comes from


def queries_first(occluded: ArrayLike, tracks: ArrayLike) -> Queries:
    """Ask for every track where it is first visible; tracks never visible are left out.

    ``occluded`` is ``(N, T)`` boolean, ``tracks`` ``(N, T, 2)`` (x, y) in any unit.
    """
    (positions,) = _positions("(N, T, 2)", tracks=tracks)
    hidden = _flags("occluded", occluded, positions)
    index = (~hidden).any(1).nonzero()[0]
    return _queries(hidden, positions, index, hidden[index].argmin(1))


def queries_strided(occluded: ArrayLike, tracks: ArrayLike, stride: int = 5) -> Queries:
    """Ask for every track in frames 0, stride, 2 * stride, ... in which it is visible.

    Arguments are those of :func:`queries_first`; queries come by frame, then by track.
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
    """Track points by features ``(T, C, h, w)``, both ways from the frame each is asked for in.

    Points are ``(Q, 2)`` (x, y) pixels in ``frames`` ``(Q,)``; one outside is moved to the edge.
    Options are those of :func:`~cosettle_adapter.correspondence.track_points`.

    Returns:
        ``(Q, T, 2)`` float64 (x, y) pixels, and ``(Q, T)`` patches by which a point misses itself
        on the way back.
    """
    asked = torch.as_tensor(frames).long()
    limits = torch.tensor(features.shape[-2:], dtype=torch.float64) - 0.5
    places = geometry.pixels_to_cells(points.double()).clamp(min=-0.5).minimum(limits)
    xy = torch.zeros(len(asked), len(features), 2, dtype=torch.float64)
    error = torch.zeros(len(asked), len(features))
    for frame in sorted(set(asked.tolist())):
        chosen = asked == frame
        # frames are matched with the query's one by one, so their order does not matter
        maps = (features[index] for index in (frame, *range(len(features))))
        tracks = track_points(maps, places[chosen].to(features.device), **options)
        found = geometry.cells_to_pixels(tracks.positions[1:].double().cpu())
        xy[chosen] = rearrange(found, "t q two -> q t two")
        error[chosen] = rearrange(tracks.cycle_error[1:].float().cpu(), "t q -> q t")
    return xy, error


def _queries(hidden: Flags, positions: Floats, index: Any, frames: Any) -> Queries:
    points = np.column_stack([frames, positions[index, frames][:, ::-1]])
    return Queries(points, hidden[index], positions[index], index)


def _positions(form: str, **given: ArrayLike) -> list[Floats]:
    found: list[Floats] = [np.asarray(value, dtype=np.float64) for value in given.values()]
    for name, xy in zip(given, found, strict=True):
        if xy.ndim != 3 or xy.shape[2] != 2 or xy.shape != found[0].shape:
            raise FrameError(
                f"got {name} of shape {xy.shape}, expected {form}: (x, y) positions, all of one "
                f"shape ({next(iter(given))} has {found[0].shape})"
            )
    return found


def _flags(name: str, value: ArrayLike, positions: Floats) -> Flags:
    shape = positions.shape[:2]
    found: Flags = np.asarray(value)
    if found.shape != shape or found.dtype != np.bool_:
        raise FrameError(f"got {name} {found.dtype} {found.shape}, expected bool {shape}")
    return found


def _check_finite(name: str, positions: Floats, counted: Flags) -> None:
    if not np.isfinite(positions[counted]).all():
        raise FrameError(f"{name} has a position that counts and is not finite; mark it as unseen")


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")
