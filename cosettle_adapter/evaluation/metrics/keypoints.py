"""PCK, the share of tracked joints found, as on JHMDB.

All positions are (x, y) pixels of one frame size, annotation and prediction in the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.metrics.positions import check_finite, flags, positions
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
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
        np: Any = require("numpy", extra="eval", purpose="measuring joints")
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
    np: Any = require("numpy", extra="eval", purpose="measuring joints")
    truth = positions("gt", gt)
    seen = flags("visible", visible, truth.shape[:2])
    check_finite("gt", truth, seen)
    low = np.where(seen[..., None], truth, np.inf).min(1)
    high = np.where(seen[..., None], truth, -np.inf).max(1)
    with np.errstate(invalid="ignore"):
        diagonal = np.linalg.norm(high - low, axis=1)
    scale: NDArray[np.float64] = np.where(seen.any(1), share * diagonal, np.nan)
    return scale


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
    np: Any = require("numpy", extra="eval", purpose="measuring joints")
    truth, guess = positions("gt", gt), positions("pred", pred)
    if guess.shape != truth.shape:
        raise FrameError(f"got pred of shape {guess.shape}, expected {truth.shape} like gt")
    if len(truth) < 2 and not first_frame:
        raise FrameError(
            f"got {len(truth)} frame(s), expected at least 2: the first one is given and does not "
            "count; pass first_frame=True to count it"
        )
    if not all(threshold >= 0 for threshold in thresholds):
        raise ValueError(f"thresholds must be 0 or more, got {tuple(thresholds)}")
    seen = flags("visible", visible, truth.shape[:2])
    check_finite("gt", truth, seen)
    check_finite("pred", guess, seen)
    if scale is None:
        lengths = joint_box_scale(truth, seen)
    else:
        lengths = np.asarray(scale, dtype=np.float64)
        if lengths.shape not in ((), truth.shape[:1]):
            raise FrameError(
                f"got scale of shape {lengths.shape}, expected a number or (T,) = "
                f"{truth.shape[:1]} pixels"
            )
        if not (lengths >= 0).all():
            raise ValueError(f"scale must be 0 or more pixels, got {float(lengths.min())}")
        lengths = np.broadcast_to(lengths, truth.shape[:1])
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
