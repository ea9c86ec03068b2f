"""J and F as the DAVIS benchmark defines them, in plain NumPy and SciPy.

It stands for davis2017-evaluation's ``db_eval_iou`` and ``f_measure``: masks of the whole frame,
boundaries by ``_seg2bmap``, and each boundary dilated by a disk of the tolerance to find what lies
near it. The original dilates with OpenCV, which is faster than SciPy's dilation; so there is a
second version, which finds the same pixels by a distance transform of the whole frame: the fastest
plain way that SciPy has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosettle_adapter.extras import require

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

_BOUND = 0.008


def region_similarity(annotation: Mask, mask: Mask) -> float:
    """Return intersection over union; 1 where both are empty."""
    np: Any = require("numpy", extra="eval", purpose="measuring masks")
    union = np.sum(annotation | mask)
    return 1.0 if np.isclose(union, 0) else float(np.sum(annotation & mask) / union)


def boundary_f(annotation: Mask, mask: Mask) -> float:
    """Return the harmonic mean of the boundary's precision and recall."""
    return _boundary_f(annotation, mask, near=_dilated)


def boundary_f_by_distance(annotation: Mask, mask: Mask) -> float:
    """Return the same, by distances to the boundaries."""
    return _boundary_f(annotation, mask, near=_within)


def _dilated(boundary: Mask, reach: int) -> Mask:
    np: Any = require("numpy", extra="eval", purpose="measuring masks")
    ndimage: Any = require("scipy.ndimage", extra="eval", purpose="measuring boundaries")
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    dilated: Mask = ndimage.binary_dilation(boundary, x**2 + y**2 <= reach**2)
    return dilated


def _within(boundary: Mask, reach: int) -> Mask:
    ndimage: Any = require("scipy.ndimage", extra="eval", purpose="measuring boundaries")
    if not boundary.any():
        return boundary
    within: Mask = ndimage.distance_transform_edt(~boundary) <= reach
    return within


def _boundary_f(annotation: Mask, mask: Mask, *, near: Callable[[Mask, int], Mask]) -> float:
    np: Any = require("numpy", extra="eval", purpose="measuring masks")
    reach = int(np.ceil(_BOUND * np.linalg.norm(mask.shape)))
    found, true = _boundary(mask), _boundary(annotation)
    near_found, near_true = near(found, reach), near(true, reach)
    in_found, in_true = np.sum(found), np.sum(true)
    if in_found == 0 and in_true > 0:
        precision, recall = 1.0, 0.0
    elif in_found > 0 and in_true == 0:
        precision, recall = 0.0, 1.0
    elif in_found == 0 and in_true == 0:
        precision, recall = 1.0, 1.0
    else:
        precision = float(np.sum(found & near_true) / in_found)
        recall = float(np.sum(true & near_found) / in_true)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _boundary(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower right neighbour."""
    np: Any = require("numpy", extra="eval", purpose="measuring masks")
    east, south, south_east = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    east[:, :-1] = mask[:, 1:]
    south[:-1, :] = mask[1:, :]
    south_east[:-1, :-1] = mask[1:, 1:]
    edges = (mask ^ east) | (mask ^ south) | (mask ^ south_east)
    edges[-1, :] = mask[-1, :] ^ east[-1, :]
    edges[:, -1] = mask[:, -1] ^ south[:, -1]
    edges[-1, -1] = False
    boundary: Mask = edges
    return boundary
