"""Checks of positions of joints, which all measures of joints share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosettle_adapter.errors import FrameError
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def positions(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return positions as ``(T, J, 2)`` float64 (x, y).

    Raises:
        FrameError: another shape.
    """
    np: Any = require("numpy", extra="eval", purpose="measuring joints")
    found: NDArray[np.float64] = np.asarray(value, dtype=np.float64)
    if found.ndim != 3 or found.shape[2] != 2:
        raise FrameError(f"got {name} of shape {found.shape}, expected (T, J, 2): (x, y) pixels")
    return found


def flags(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return flags as ``(T, J)`` boolean, all true for None.

    Raises:
        FrameError: another shape, or not boolean.
    """
    np: Any = require("numpy", extra="eval", purpose="measuring joints")
    found: NDArray[np.bool_] = np.ones(shape, dtype=bool) if value is None else np.asarray(value)
    if found.shape != shape or found.dtype != np.bool_:
        raise FrameError(
            f"got {name} of dtype {found.dtype} and shape {found.shape}, expected bool (T, J) = "
            f"{shape}"
        )
    return found


def check_finite(name: str, xy: NDArray[np.float64], counted: NDArray[np.bool_]) -> None:
    """Check that positions that count are numbers.

    Raises:
        FrameError: one is not.
    """
    np: Any = require("numpy", extra="eval", purpose="measuring joints")
    wrong = np.argwhere(~np.isfinite(xy).all(2) & counted)
    if len(wrong):
        frame, joint = wrong[0].tolist()
        raise FrameError(
            f"{name} of joint {joint} in frame {frame} is {xy[frame, joint].tolist()}, "
            "expected finite (x, y) pixels; mark joints that are not there as invisible"
        )
