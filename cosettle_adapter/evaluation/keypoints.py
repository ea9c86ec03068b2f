"""Measures of tracked joints: PCK as on JHMDB, and BADJA's delta_seg and delta_3px.

All positions are (x, y) pixels of one frame size, annotation and prediction in the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

JOINT_BOX_SHARE = 0.6  # of the diagonal of the joints' box: a stand-in for the person's size


@dataclasses.dataclass(frozen=True, eq=False)
class Pck:
    """How many joints were found, in a form that adds up over clips.

    Attributes:
        thresholds: the K thresholds, in units of the scale.
        correct: ``(J, K)`` int64, how often a joint lay within a threshold.
        total: ``(J,)`` int64, how often it counted.
    """

    thresholds: tuple[float, ...]
    correct: NDArray[np.int64]
    total: NDArray[np.int64]

    @property
    def per_joint(self) -> NDArray[np.float64]:
        """``(J, K)`` share found of every joint, in [0, 1]; NaN for one that never counted."""
        share: NDArray[np.float64] = np.full(self.correct.shape, np.nan)
        total = self.total[:, None]
        np.divide(self.correct, total, out=share, where=total > 0)
        return share

    @property
    def mean(self) -> dict[float, float]:
        """PCK by threshold: the mean over joints that counted, each joint once."""
        known = self.per_joint[self.total > 0]
        return {
            threshold: float(known[:, k].mean()) if len(known) else float("nan")
            for k, threshold in enumerate(self.thresholds)
        }

    def __add__(self, other: Pck) -> Pck:
        """Pool two clips: a joint's share is over all its frames, long clips count for more.

        Raises:
            ValueError: other thresholds or another number of joints.
        """
        if self.thresholds != other.thresholds or self.correct.shape != other.correct.shape:
            raise ValueError(
                f"cannot pool {len(self.total)} joints at {self.thresholds} with "
                f"{len(other.total)} joints at {other.thresholds}; measure both alike"
            )
        return Pck(self.thresholds, self.correct + other.correct, self.total + other.total)


def joint_box_scale(
    gt: ArrayLike, visible: ArrayLike | None = None, *, share: float = JOINT_BOX_SHARE
) -> NDArray[np.float64]:
    """Return the length that PCK calls 1: a share of the diagonal of the visible joints' box.

    Args:
        gt: ``(T, J, 2)`` annotated (x, y) pixels.
        visible: ``(T, J)`` boolean, the joints that make the box; by default all.
        share: of the diagonal; 0.6 for JHMDB.

    Returns:
        ``(T,)`` pixels; NaN for a frame without a visible joint.

    Raises:
        FrameError: shapes that do not fit together, or a visible position that is not finite.
    """
    truth = _positions("gt", gt)
    seen = _flags(visible, truth)
    _check_finite("gt", truth, seen)
    low = np.where(seen[..., None], truth, np.inf).min(1)
    high = np.where(seen[..., None], truth, -np.inf).max(1)
    with np.errstate(invalid="ignore"):
        diagonal = np.linalg.norm(high - low, axis=1)
    return np.where(seen.any(1), share * diagonal, np.nan)


def pck(
    gt: ArrayLike,
    pred: ArrayLike,
    scale: ArrayLike | None = None,
    thresholds: Sequence[float] = (0.1, 0.2),
    *,
    visible: ArrayLike | None = None,
    first_frame: bool = False,
) -> Pck:
    """Count the joints of a clip whose distance is at most ``threshold * scale``.

    With the defaults this is the JHMDB measure of videowalk and all who follow it: the scale is
    0.6 * diagonal of the box of a frame's visible joints, the first frame, which is given, does
    not count, every joint's share is pooled over all frames of all clips, and PCK is the mean of
    the 15 shares. "Visible" in the published code is a property of the prediction, not of the
    annotation: a joint whose propagated heat map is empty everywhere is left out, out of the box
    and of the counts; pass ``visible=`` such a mask to reproduce it. It leaves out nothing else:
    annotated joints outside the frame count.

    Args:
        gt: ``(T, J, 2)`` annotated (x, y) pixels.
        pred: ``(T, J, 2)`` predicted (x, y) in the same pixels.
        scale: ``(T,)`` pixels, or one number for all frames; by default
            :func:`joint_box_scale`. A joint of a frame whose scale is 0 counts as missed.
        thresholds: in units of the scale.
        visible: ``(T, J)`` boolean, joints that count; by default all.
        first_frame: count the first frame too.

    Returns:
        Counts, which add up over clips: ``sum(rest, start=first).mean[0.1]``.

    Raises:
        FrameError: shapes that do not fit together, a position that counts and is not finite, or
            no frame that counts.
        ValueError: a scale or threshold that is negative.
    """
    truth, guess, seen = _checked(gt, pred, visible)
    if len(truth) < 2 and not first_frame:
        raise FrameError(
            f"got {len(truth)} frame(s), expected at least 2: the first one is given and does not "
            "count; pass first_frame=True to count it"
        )
    if not all(threshold >= 0 for threshold in thresholds):
        raise ValueError(f"thresholds must be 0 or more, got {tuple(thresholds)}")
    _check_finite("gt", truth, seen)
    _check_finite("pred", guess, seen)
    lengths = joint_box_scale(truth, seen) if scale is None else _lengths(scale, len(truth))
    counted = seen.copy()
    counted[: 0 if first_frame else 1] = False
    distance = np.linalg.norm(guess - truth, axis=2)
    # the published code divides, so that 0 / 0, which is not a number, is a miss
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = distance / lengths[:, None]
        within = relative[..., None] <= np.asarray(thresholds, dtype=np.float64)
    return Pck(
        tuple(float(threshold) for threshold in thresholds),
        correct=(within & counted[..., None]).sum(0),
        total=counted.sum(0),
    )


class BadjaAccuracy(NamedTuple):
    """Share of joints found in one clip; a data set's figure is the mean over its clips.

    Attributes:
        delta_seg: share within 0.2 * sqrt(area of the animal's mask), in [0, 1].
        delta_3px: share within 3 pixels; it depends on the frame size.
        positions: how many positions counted; where it is 0, both shares are NaN.
    """

    delta_seg: float
    delta_3px: float
    positions: int


def badja_accuracy(
    gt: ArrayLike,
    pred: ArrayLike,
    visible: ArrayLike,
    areas: ArrayLike,
    *,
    query_frames: ArrayLike | None = None,
) -> BadjaAccuracy:
    """Share of an animal's joints that were tracked well.

    The published rule: a position counts where the joint is annotated as visible, in every frame
    but the first of the clip; distances are strictly below the threshold, and all positions of
    the clip are pooled.

    Args:
        gt: ``(T, J, 2)`` annotated (x, y) pixels, the first frame first; frames without
            annotation may be left out or be marked invisible.
        pred: ``(T, J, 2)`` predicted (x, y) in the same pixels.
        visible: ``(T, J)`` boolean; others may hold any position. Mark joints that were never
            queried as invisible.
        areas: ``(T,)`` pixels of the animal's mask in the frame size of the positions; only read
            where a joint counts.
        query_frames: ``(J,)`` index of the frame that each joint was queried in. Given these,
            that frame and those before it do not count either, which is stricter than the
            published rule where joints appear late.

    Raises:
        FrameError: shapes that do not fit together, or a position that counts and is not finite.
    """
    truth, guess, seen = _checked(gt, pred, visible)
    counted = seen.copy()
    counted[:1] = False
    sizes = np.asarray(areas, dtype=np.float64)
    if sizes.shape != truth.shape[:1]:
        raise FrameError(f"got areas of shape {sizes.shape}, expected (T,) = {truth.shape[:1]}")
    if query_frames is not None:
        queried = np.asarray(query_frames)
        if queried.shape != truth.shape[1:2]:
            raise FrameError(
                f"got query_frames of shape {queried.shape}, expected (J,) = {truth.shape[1:2]}"
            )
        counted &= np.arange(len(truth))[:, None] > queried
    _check_finite("gt", truth, counted)
    _check_finite("pred", guess, counted)
    if not (sizes[counted.any(1)] >= 0).all():
        raise FrameError("areas of frames that count must be 0 or more pixels of the animal's mask")
    distance = np.linalg.norm(guess - truth, axis=2)[counted]
    area = np.broadcast_to(sizes[:, None], counted.shape)[counted]
    if not len(distance):
        return BadjaAccuracy(float("nan"), float("nan"), 0)
    return BadjaAccuracy(
        delta_seg=float((distance < 0.2 * np.sqrt(area)).mean()),
        delta_3px=float((distance < 3).mean()),
        positions=len(distance),
    )


def _checked(
    gt: ArrayLike, pred: ArrayLike, visible: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    truth, guess = _positions("gt", gt), _positions("pred", pred)
    if guess.shape != truth.shape:
        raise FrameError(f"got pred of shape {guess.shape}, expected {truth.shape} like gt")
    return truth, guess, _flags(visible, truth)


def _positions(name: str, value: ArrayLike) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.asarray(value, dtype=np.float64)
    if found.ndim != 3 or found.shape[2] != 2:
        raise FrameError(f"got {name} of shape {found.shape}, expected (T, J, 2): (x, y) pixels")
    return found


def _flags(value: ArrayLike | None, truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    shape = truth.shape[:2]
    found: NDArray[np.bool_] = np.ones(shape, dtype=bool) if value is None else np.asarray(value)
    if found.shape != shape or found.dtype != np.bool_:
        raise FrameError(
            f"got visible of dtype {found.dtype} and shape {found.shape}, expected bool (T, J) = "
            f"{shape}"
        )
    return found


def _check_finite(name: str, xy: NDArray[np.float64], counted: NDArray[np.bool_]) -> None:
    wrong = np.argwhere(~np.isfinite(xy).all(2) & counted)
    if len(wrong):
        frame, joint = wrong[0].tolist()
        raise FrameError(
            f"{name} of joint {joint} in frame {frame} is {xy[frame, joint].tolist()}, "
            "expected finite (x, y) pixels; mark joints that are not there as invisible"
        )


def _lengths(scale: ArrayLike, frames: int) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.asarray(scale, dtype=np.float64)
    if lengths.shape not in ((), (frames,)):
        raise FrameError(
            f"got scale of shape {lengths.shape}, expected a number or (T,) = {(frames,)} pixels"
        )
    if not (lengths >= 0).all():
        raise ValueError(f"scale must be 0 or more pixels, got {float(lengths.min())}")
    return np.broadcast_to(lengths, (frames,))
