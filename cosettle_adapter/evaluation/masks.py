"""DAVIS measures of a mask against its annotation, region similarity J and boundary F; PNG files.

Both equal the official evaluation's numbers (davis2017-evaluation) to rounding; F finds boundary
pixels near one another with a k-d tree over the boundaries, whose cost does not depend on the
size of the frame, in place of dilating whole frames.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

Mask = NDArray[np.bool_]


class Summary(NamedTuple):
    """Statistics of a measure over the frames of one object."""

    mean: float
    recall: float  # share of frames above 0.5
    decay: float  # mean of the first quarter of the frames minus mean of the last quarter


def region_similarity(gt: ArrayLike, pred: ArrayLike, *, void: ArrayLike | None = None) -> float:
    """Return J in [0, 1], the intersection over union of two masks; 1 if both are empty.

    Masks are ``(H, W)`` boolean; pixels of ``void`` do not count.
    """
    truth, guess = _masks(gt, pred, void)
    union = int((truth | guess).sum())
    return int((truth & guess).sum()) / union if union else 1.0


def boundary_f(
    gt: ArrayLike, pred: ArrayLike, tolerance: float = 0.008, *, void: ArrayLike | None = None
) -> float:
    """Return F in [0, 1], the harmonic mean of precision and recall of a mask's boundary.

    A boundary pixel counts as found if a boundary pixel of the other mask lies within the
    tolerance, by Euclidean distance. F is 1 if neither mask has a boundary, 0 if only one has.

    Masks are ``(H, W)`` boolean; pixels of ``void`` are background in both. A tolerance below 1 is
    a share of the frame's diagonal, rounded up to whole pixels; from 1 on, it is pixels.
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
    """Summarise a measure over frames ``(T,)`` as the official evaluation does.

    NaN stands for frames that do not count. Quarters share their border frames, and clips of more
    than 255 frames get the decay the definition says (the official code's frame index overflows).
    """
    series: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not len(series):
        raise ValueError(f"got values of shape {series.shape}, expected (T,) with T at least 1")
    edges = np.round(np.linspace(1, len(series), 5) + 1e-10).astype(int) - 1
    first, last = series[: edges[1] + 1], series[edges[3] :]
    # a frame without a value is not above 0.5, and still a frame
    return Summary(_mean(series), float((series > 0.5).mean()), _mean(first) - _mean(last))


def palette() -> bytes:
    """Return the palette of PASCAL VOC and DAVIS: 256 RGB colours."""
    # a label's bits, three at a time, set those of red, green and blue from the highest down
    return bytes(
        sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(3))
        for label in range(256)
        for channel in range(3)
    )


def save_labels(labels: NDArray[np.uint8], path: Path) -> None:
    """Write a label map ``(H, W)`` as a palette PNG, which the official DAVIS evaluation reads."""
    image: Any = require("PIL.Image", extra="eval", purpose="writing predictions")
    picture = image.fromarray(labels, mode="P")
    picture.putpalette(palette())
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _masks(gt: ArrayLike, pred: ArrayLike, void: ArrayLike | None) -> tuple[Mask, Mask]:
    truth, guess = np.asarray(gt), np.asarray(pred)
    out: Mask = np.zeros(truth.shape, dtype=bool) if void is None else np.asarray(void)
    if truth.ndim != 2 or not truth.shape == guess.shape == out.shape:
        raise FrameError(
            f"got gt {truth.shape}, pred {guess.shape} and void {out.shape}, expected (H, W) of one"
            " size: resize the prediction to the annotation first (nearest)"
        )
    if not truth.dtype == guess.dtype == out.dtype == np.bool_:
        raise FrameError("masks must be boolean; for an object of a label map use labels == id")
    return truth & ~out, guess & ~out


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
