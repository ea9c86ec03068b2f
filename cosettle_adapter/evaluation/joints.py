"""Annotated joints of a clip, and a small JSON format for data sets that lack one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cosettle_adapter.errors import FrameError

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEYPOINTS = "keypoints.json"


class Joints(NamedTuple):
    """Annotated joints of a clip, one row for every annotated frame.

    Attributes:
        names: J names.
        xy: ``(A, J, 2)`` float64 (x, y) in pixels of the clip's frames; any value where not
            visible.
        visible: ``(A, J)`` boolean.
        areas: ``(A,)`` float64, pixels of the clip's frames that show the whole animal; None
            where that is not annotated.
    """

    names: tuple[str, ...]
    xy: NDArray[np.float64]
    visible: NDArray[np.bool_]
    areas: NDArray[np.float64] | None = None


class KeypointFile(NamedTuple):
    """What a keypoint file says.

    Attributes:
        names: J names of joints.
        size: (height, width) of the frames that positions are in.
        frames: A frame numbers, ascending.
        xy: ``(A, J, 2)`` float64 (x, y) pixels as written.
        visible: ``(A, J)`` boolean.
    """

    names: tuple[str, ...]
    size: tuple[int, int]
    frames: tuple[int, ...]
    xy: NDArray[np.float64]
    visible: NDArray[np.bool_]


def read_keypoints(path: Path) -> KeypointFile:
    """Read ``{"keypoint_names", "width", "height", "annotations": [{"frame", "xy", "visible"}]}``.

    ``xy`` holds one ``[x, y]`` and ``visible`` one boolean for every name.

    Raises:
        FrameError: the file is missing, not JSON, or not of this form.
    """
    content = read_json(path)
    try:
        names = tuple(str(name) for name in content["keypoint_names"])
        size = int(content["height"]), int(content["width"])
        rows = sorted(content["annotations"], key=lambda row: int(row["frame"]))
        frames = tuple(int(row["frame"]) for row in rows)
        xy = np.array([row["xy"] for row in rows], dtype=np.float64)
        visible = np.array([row["visible"] for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(
            f"{path} is not a keypoint file ({type(error).__name__}: {error}); expected "
            '{"keypoint_names", "width", "height", "annotations": [{"frame", "xy", "visible"}]}'
        ) from error
    count = len(names)
    if xy.shape != (len(frames), count, 2) or visible.shape != xy.shape[:2] or not frames:
        raise FrameError(
            f"{path} has positions of shape {xy.shape} and visibility of shape {visible.shape}, "
            f"expected (A, {count}, 2) and (A, {count}) for its {count} joints and at least one "
            "frame"
        )
    if visible.dtype != np.bool_ or len(set(frames)) != len(frames):
        raise FrameError(f"{path} must have true or false for visible, and every frame once")
    return KeypointFile(names, size, frames, xy, visible)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FrameError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FrameError(f"{path} cannot be read as JSON: {error}") from error
