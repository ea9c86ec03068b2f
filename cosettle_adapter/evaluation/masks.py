"""DAVIS measures of a mask against its annotation: region similarity J and boundary F.

Both equal the official evaluation's numbers (davis2017-evaluation) to rounding; F finds boundary
pixels near one another with a k-d tree over the boundaries, whose cost does not depend on the
size of the frame, in place of dilating whole frames.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Mask = NDArray[np.bool_]


class Summary(NamedTuple):
    """Statistics of a measure over the frames of one object.

    Attributes:
        mean: mean over frames.
        recall: share of frames above 0.5.
        decay: mean of the first quarter of the frames minus mean of the last quarter.
    """

    mean: float
    recall: float
    decay: float


def region_similarity(gt: ArrayLike, pred: ArrayLike, *, void: ArrayLike | None = None) -> float:
    """Return J, the intersection over union of two masks.

    Args:
        gt: ``(H, W)`` boolean annotation.
        pred: ``(H, W)`` boolean prediction.
        void: ``(H, W)`` boolean, pixels that do not count.

    Returns:
        J in [0, 1]; 1 if both masks are empty.

    Raises:
        FrameError: masks of different shapes, or not boolean.
    """
    truth, guess = _masks(gt, pred, void)
    union = int((truth | guess).sum())
    return int((truth & guess).sum()) / union if union else 1.0


def boundary_f(
    gt: ArrayLike, pred: ArrayLike, tolerance: float = 0.008, *, void: ArrayLike | None = None
) -> float:
    """Return F, the harmonic mean of precision and recall of a mask's boundary.

    A boundary pixel counts as found if a boundary pixel of the other mask lies within the
    tolerance, by Euclidean distance.

    Args:
        gt: ``(H, W)`` boolean annotation.
        pred: ``(H, W)`` boolean prediction.
        tolerance: below 1 a share of the frame's diagonal, rounded up to whole pixels; from 1
            on, pixels.
        void: ``(H, W)`` boolean, pixels taken as background in both masks.

    Returns:
        F in [0, 1]; 1 if neither mask has a boundary, 0 if only one has.

    Raises:
        FrameError: masks of different shapes, or not boolean.
        ValueError: ``tolerance`` is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
    truth, guess = _masks(gt, pred, void)
    reach = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    truth_points, guess_points = _boundary_points(truth), _boundary_points(guess)
    if not len(truth_points) or not len(guess_points):
        return float(len(truth_points) == len(guess_points))
    recall = _share_near(truth_points, guess_points, reach)
    precision = _share_near(guess_points, truth_points, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def summarise(values: ArrayLike) -> Summary:
    """Summarise a measure over frames as the official evaluation does.

    Args:
        values: ``(T,)``, one value a frame, in order; NaN for frames that do not count.

    Returns:
        Mean, recall and decay. Quarters share their border frames, and clips of more than 255
        frames get the decay the definition says (the official code's frame index overflows).

    Raises:
        ValueError: not one-dimensional, or empty.
    """
    series: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise ValueError(f"got values of shape {series.shape}, expected (T,) with T at least 1")
    edges = np.round(np.linspace(1, len(series), 5) + 1e-10).astype(int) - 1
    first, last = series[: edges[1] + 1], series[edges[3] :]
    # a frame without a value is not above 0.5, and still a frame
    return Summary(_mean(series), float((series > 0.5).mean()), _mean(first) - _mean(last))


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _masks(gt: ArrayLike, pred: ArrayLike, void: ArrayLike | None) -> tuple[Mask, Mask]:
    masks = {"gt": np.asarray(gt), "pred": np.asarray(pred)}
    if void is not None:
        masks["void"] = np.asarray(void)
    for name, mask in masks.items():
        if mask.ndim != 2 or mask.shape != masks["gt"].shape:
            raise FrameError(
                f"got {name} of shape {mask.shape}, expected (H, W) = {masks['gt'].shape} like "
                "gt: resize the prediction to the annotation first (nearest, or argmax after "
                "resizing soft labels)"
            )
        if mask.dtype != np.bool_:
            raise FrameError(
                f"got {name} of dtype {mask.dtype}, expected bool; for one object of a label map "
                "use labels == object_id"
            )
    if void is None:
        return masks["gt"], masks["pred"]
    return masks["gt"] & ~masks["void"], masks["pred"] & ~masks["void"]


def _boundary_points(mask: Mask) -> NDArray[np.int64]:
    """Pixels that differ from their right, lower or lower right neighbour, ``(N, 2)``."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return np.zeros((0, 2), dtype=np.int64)
    # all boundary pixels lie in the mask's bounding box or one before it
    top, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)
    box = mask[top : rows[-1] + 2, left : columns[-1] + 2]
    # outside the frame is like its last row and column, as in the official seg2bmap
    padded = np.pad(box, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edges = (box ^ right) | (box ^ below) | (box ^ diagonal)
    points: NDArray[np.int64] = np.argwhere(edges) + np.array([top, left])
    return points


def _share_near(points: Any, others: Any, reach: float) -> float:
    """Share of integer points that lie within ``reach`` of one of the others."""
    spatial: Any = require("scipy.spatial", extra="eval", purpose="measuring boundaries")
    # squared distances are whole numbers: the bound, which is strict, lies between two of them
    bound = math.sqrt(math.floor(reach**2) + 0.5)
    distance, _ = spatial.cKDTree(others).query(points, distance_upper_bound=bound)
    return float((distance < bound).mean())
