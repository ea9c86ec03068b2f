"""BADJA's measures of an animal's tracked joints: delta_seg and delta_3px.

All positions are (x, y) pixels of one frame size, annotation and prediction in the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.metrics.positions import check_finite, flags, positions
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


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
    np: Any = require("numpy", extra="eval", purpose="measuring joints")
    truth, guess = positions("gt", gt), positions("pred", pred)
    if guess.shape != truth.shape:
        raise FrameError(f"got pred of shape {guess.shape}, expected {truth.shape} like gt")
    counted = flags("visible", visible, truth.shape[:2]).copy()
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
    check_finite("gt", truth, counted)
    check_finite("pred", guess, counted)
    needed = sizes[counted.any(1)]
    if not (needed >= 0).all():
        raise FrameError("areas of frames that count must be 0 or more pixels of the animal's mask")
    distance = np.linalg.norm(guess - truth, axis=2)[counted]
    threshold = np.broadcast_to(sizes[:, None], counted.shape)[counted]
    if not len(distance):
        return BadjaAccuracy(float("nan"), float("nan"), 0)
    return BadjaAccuracy(
        delta_seg=float((distance < 0.2 * np.sqrt(threshold)).mean()),
        delta_3px=float((distance < 3).mean()),
        positions=len(distance),
    )
