"""TAP-Vid's measures of tracked points, and how it samples the points to ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from einops import rearrange

from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

THRESHOLDS = (1, 2, 4, 8, 16)  # pixels of a 256 x 256 frame

QueryMode = Literal["first", "strided"]


class TapVidMetrics(NamedTuple):
    """TAP-Vid's figures of one video, in [0, 1]; NaN where nothing is there to be counted.

    Attributes:
        delta_avg: mean of ``pts_within``; NaN if no point that counts is visible.
        occlusion_accuracy: OA, share of positions whose occlusion is predicted rightly; NaN if no
            position counts.
        average_jaccard: AJ, mean of ``jaccard``; NaN if no point that counts is visible, neither
            by annotation nor by prediction.
        pts_within: by threshold, share of visible positions strictly within it, whatever the
            predicted occlusion.
        jaccard: by threshold, true positives / (visible positions + false positives).
    """

    delta_avg: float
    occlusion_accuracy: float
    average_jaccard: float
    pts_within: dict[int, float]
    jaccard: dict[int, float]


class Queries(NamedTuple):
    """Points to ask for, each with the track it belongs to.

    Attributes:
        points: ``(Q, 3)`` (t, y, x): frame number, then the position in the units of the tracks.
        occluded: ``(Q, T)`` boolean.
        tracks: ``(Q, T, 2)`` (x, y).
        track: ``(Q,)`` row of the annotated track that the query comes from.
    """

    points: NDArray[np.float64]
    occluded: NDArray[np.bool_]
    tracks: NDArray[np.float64]
    track: NDArray[np.int64]


def tapvid_metrics(
    query_points: ArrayLike,
    gt_occluded: ArrayLike,
    gt_tracks: ArrayLike,
    pred_occluded: ArrayLike,
    pred_tracks: ArrayLike,
    mode: QueryMode = "first",
) -> TapVidMetrics:
    """Score the tracked points of one video as TAP-Vid does.

    Positions must be scaled to a 256 x 256 frame, which the thresholds of 1 to 16 pixels belong
    to. A benchmark's figure is the mean over videos in which it is not NaN.

    Args:
        query_points: ``(Q, 3)`` (t, y, x); only t is read, rounded to a frame number.
        gt_occluded: ``(Q, T)`` boolean annotation.
        gt_tracks: ``(Q, T, 2)`` annotated (x, y); where occluded, any position.
        pred_occluded: ``(Q, T)`` boolean prediction.
        pred_tracks: ``(Q, T, 2)`` predicted (x, y).
        mode: ``"first"`` counts the frames after the query's, ``"strided"`` all but the query's.

    Raises:
        FrameError: shapes that do not fit together, occlusion that is not boolean, a query frame
            outside the video, or a position that is not finite where it counts.
        ValueError: an unknown mode.
    """
    if mode not in ("first", "strided"):
        raise ValueError(f"got mode={mode!r}, expected 'first' or 'strided'")
    occluded, tracks = _tracks(gt_occluded, gt_tracks, "gt")
    guess_occluded, guess = _tracks(pred_occluded, pred_tracks, "pred")
    if guess.shape != tracks.shape:
        raise FrameError(f"got pred_tracks of shape {guess.shape}, expected {tracks.shape} like gt")
    counted = _counted(query_points, tracks.shape[:2], mode)
    visible, guess_visible = ~occluded & counted, ~guess_occluded & counted
    for name, positions in (("gt_tracks", tracks), ("pred_tracks", guess)):
        if not np.isfinite(positions[visible]).all():
            raise FrameError(
                f"{name} has a position that is not finite where the annotated point is visible; "
                "give a position for every frame, occluded or not"
            )
    with np.errstate(invalid="ignore"):
        squared = ((guess - tracks) ** 2).sum(2)
    within, jaccard = {}, {}
    for threshold in THRESHOLDS:
        near = squared < threshold**2
        within[threshold] = _share((near & visible).sum(), visible.sum())
        true_positives = (near & visible & guess_visible).sum()
        false_positives = (guess_visible & ~(near & visible)).sum()
        jaccard[threshold] = _share(true_positives, visible.sum() + false_positives)
    return TapVidMetrics(
        delta_avg=float(np.mean(list(within.values()))),
        occlusion_accuracy=_share(((occluded == guess_occluded) & counted).sum(), counted.sum()),
        average_jaccard=float(np.mean(list(jaccard.values()))),
        pts_within=within,
        jaccard=jaccard,
    )


def queries_first(occluded: ArrayLike, tracks: ArrayLike) -> Queries:
    """Ask for every track where it is first visible; tracks never visible are left out.

    Args:
        occluded: ``(N, T)`` boolean annotation.
        tracks: ``(N, T, 2)`` annotated (x, y), in pixels or any other unit.

    Raises:
        FrameError: shapes that do not fit together, or occlusion that is not boolean.
    """
    hidden, positions = _tracks(occluded, tracks, "gt")
    index = (~hidden).any(1).nonzero()[0]
    return _queries(hidden, positions, index, np.argmin(hidden[index], axis=1))


def queries_strided(occluded: ArrayLike, tracks: ArrayLike, stride: int = 5) -> Queries:
    """Ask for every track in frames 0, stride, 2 * stride, ... in which it is visible.

    Args:
        occluded: ``(N, T)`` boolean annotation.
        tracks: ``(N, T, 2)`` annotated (x, y), in pixels or any other unit.
        stride: frames between queries; 5 in TAP-Vid.

    Returns:
        Queries by frame, then by track.

    Raises:
        FrameError: shapes that do not fit together, or occlusion that is not boolean.
        ValueError: ``stride`` is below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1 frame, got {stride}")
    hidden, positions = _tracks(occluded, tracks, "gt")
    position, index = rearrange(~hidden[:, ::stride], "n t -> t n").nonzero()
    return _queries(hidden, positions, index, position * stride)


def _queries(hidden: Any, positions: Any, index: Any, frames: Any) -> Queries:
    x, y = positions[index, frames, 0], positions[index, frames, 1]
    points = np.stack([frames.astype(np.float64), y, x], axis=1)
    return Queries(points, hidden[index], positions[index], index.astype(np.int64))


def _counted(query_points: ArrayLike, shape: tuple[int, ...], mode: QueryMode) -> NDArray[np.bool_]:
    """Positions ``(Q, T)`` that are scored."""
    points: NDArray[np.float64] = np.asarray(query_points, dtype=np.float64)
    if points.shape != (shape[0], 3):
        raise FrameError(
            f"got query_points of shape {points.shape}, expected (Q, 3) = {(shape[0], 3)}: "
            "(t, y, x) of every track"
        )
    query = np.round(points[:, 0])
    wrong = query[~((query >= 0) & (query < shape[1]))]
    if len(wrong):
        raise FrameError(
            f"got a query in frame {wrong[0]}, expected 0 to {shape[1] - 1}; query_points are "
            "(t, y, x), the frame first"
        )
    frames = np.arange(shape[1])
    return frames > query[:, None] if mode == "first" else frames != query[:, None]


def _tracks(
    occluded: ArrayLike, tracks: ArrayLike, whose: str
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    hidden: NDArray[np.bool_] = np.asarray(occluded)
    positions: NDArray[np.float64] = np.asarray(tracks, dtype=np.float64)
    if positions.ndim != 3 or positions.shape[2] != 2 or not positions.shape[1]:
        raise FrameError(
            f"got {whose} tracks of shape {positions.shape}, expected (Q, T, 2): (x, y) of every "
            "track in every frame"
        )
    if hidden.shape != positions.shape[:2] or hidden.dtype != np.bool_:
        raise FrameError(
            f"got {whose} occlusion of dtype {hidden.dtype} and shape {hidden.shape}, expected "
            f"bool (Q, T) = {positions.shape[:2]}"
        )
    return hidden, positions


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")
