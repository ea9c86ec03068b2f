"""Reading JHMDB: people in short clips, with 15 joints in every frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets.clips import JointClip, Joints
from cosettle_adapter.evaluation.datasets.images import image_size
from cosettle_adapter.evaluation.datasets.keypoint_files import NAME, read_keypoints
from cosettle_adapter.evaluation.datasets.layout import (
    entries,
    existing_folder,
    found_in,
    images_in,
    nearby,
    pick,
    require_entries,
)
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

JHMDB_JOINTS = (
    "neck",
    "belly",
    "face",
    "right_shoulder",
    "left_shoulder",
    "right_hip",
    "left_hip",
    "right_elbow",
    "left_elbow",
    "right_knee",
    "left_knee",
    "right_wrist",
    "left_wrist",
    "right_ankle",
    "left_ankle",
)
WHAT = "the folder of JHMDB that holds Rename_Images, joint_positions and splits"
_SUBSETS = {"train": "1", "test": "2"}


@dataclasses.dataclass(frozen=True)
class JhmdbClip(JointClip):
    """One clip of JHMDB, read when asked; every frame has joints."""

    def read_joints(self) -> Joints:
        """Read the 15 joints of every frame.

        Positions are (x, y) as :mod:`~cosettle_adapter.video.geometry` has them: pixel (0, 0)
        has its centre at (0.5, 0.5). The file counts pixels from 1, so 0.5 is subtracted. (The
        published evaluation subtracts 1 and takes a pixel's centre as a whole number.)

        Returns:
            Joints of all frames; visible are those inside the frame. The published measure does
            not use that: it counts joints outside too.

        Raises:
            FrameError: the clip has a problem, or the file is not what it should be.
        """
        self.check()
        np: Any = require("numpy", extra="eval", purpose="reading joints")
        if self.joints_file.suffix == ".json":
            xy = read_keypoints(self.joints_file).xy - 0.5
        else:
            xy = _read_mat(self.joints_file)[: len(self)] - 0.5
        height, width = image_size(self.frames[0])
        inside = ((xy >= 0) & (xy <= np.array([width, height]))).all(2)
        return Joints(xy, inside)


def jhmdb_clips(
    root: str | Path,
    *,
    subset: Literal["test", "train"] = "test",
    split: int = 1,
    clips: Sequence[str] | None = None,
) -> list[JhmdbClip]:
    """List the clips of JHMDB; of the joints only the number of frames is read.

    The official layout is ``Rename_Images/<class>/<clip>/*.png``,
    ``joint_positions/<class>/<clip>/joint_positions.mat`` with ``pos_img`` of shape (2, 15, T),
    and ``splits/<class>_test_split<n>.txt`` with ``<clip>.avi 1`` (train) or ``2`` (test) a line.
    Frames beyond T, which some clips have, are left out. A folder of clips, each with ``frames/``
    and ``keypoints.json``, is taken as well; it has no splits.

    Args:
        root: the folder that holds ``Rename_Images``, or clips with ``keypoints.json``.
        subset: ``"test"`` (268 clips in split 1, which published figures use) or ``"train"``.
        split: 1, 2 or 3.
        clips: names of the clips wanted; by default all of the subset.

    Returns:
        The clips, by class and in the order of its list. One that cannot be used has a
        ``problem`` and raises it when read.

    Raises:
        FrameError: a folder or list that should be there is not, or a clip that is not listed.
        ValueError: an unknown subset or split.
    """
    if subset not in _SUBSETS or split not in (1, 2, 3):
        raise ValueError(
            f"got subset={subset!r} and split={split}, expected 'test' or 'train' and 1, 2 or 3"
        )
    root = existing_folder(root, WHAT)
    if (root / "Rename_Images").is_dir() or (root / "joint_positions").is_dir():
        require_entries(root, ["Rename_Images", "joint_positions", "splits"], WHAT)
        listed = _listed(root / "splits", subset, split)
        found = {name: (kind, root) for kind, name in listed}
    else:
        found = {path.name: ("", path) for path in _keypoint_folders(root)}
    for name in clips or ():
        pick(name, found, f"clip {name!r} in {root}")
    return [
        _mat_clip(root, kind, name) if kind else _json_clip(folder)
        for name, (kind, folder) in found.items()
        if clips is None or name in clips
    ]


def _listed(folder: Path, subset: str, split: int) -> list[tuple[str, str]]:
    """(class, clip) of a subset."""
    ending = f"_test_split{split}.txt"
    lists = [folder / name for name in entries(folder) if name.endswith(ending)]
    if not lists:
        raise FrameError(
            f"no lists in {folder}: expected <class>{ending}, found {found_in(folder)}; unpack "
            "splits.zip there"
        )
    found = []
    for path in lists:
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) == 2 and words[1] == _SUBSETS[subset]:
                found.append((path.name[: -len(ending)], words[0].removesuffix(".avi")))
    return found


def _mat_clip(root: Path, kind: str, name: str) -> JhmdbClip:
    images = root / "Rename_Images" / kind / name
    frames = tuple(path for path in images_in(images) if path.suffix.lower() == ".png")
    joints = root / "joint_positions" / kind / name / "joint_positions.mat"
    problem = None
    count = len(frames)
    if not frames:
        problem = f"JHMDB clip {name!r} has no frames: {images} holds {found_in(images)}"
    else:
        try:
            count = _count_mat(joints)
        except FrameError as error:
            problem = f"JHMDB clip {name!r}: {error}"
    if problem is None and count > len(frames):
        problem = (
            f"JHMDB clip {name!r} has joints for {count} frames, but {images} holds "
            f"{len(frames)}; unpack Rename_Images again"
        )
    frames = frames[:count]
    return JhmdbClip(name, frames, joints, tuple(range(len(frames))), JHMDB_JOINTS, problem=problem)


def _count_mat(path: Path) -> int:
    """Number of frames in a joint file, from its header."""
    io: Any = require("scipy.io", extra="eval", purpose="reading .mat files")
    if not path.is_file():
        raise FrameError(f"no {path}; unpack joint_positions.zip")
    try:
        shapes = {name: shape for name, shape, _ in io.whosmat(path)}
    except Exception as error:  # what SciPy raises for a damaged file is not documented
        raise FrameError(f"{path} cannot be read as a MATLAB file: {error}") from error
    shape = shapes.get("pos_img")
    if shape is None or len(shape) != 3 or shape[:2] != (2, len(JHMDB_JOINTS)):
        raise FrameError(
            f"{path} has {shapes}, expected pos_img of shape (2, {len(JHMDB_JOINTS)}, T)"
        )
    return int(shape[2])


def _read_mat(path: Path) -> NDArray[np.float64]:
    """``(T, 15, 2)`` (x, y), the first pixel's centre at 1."""
    np: Any = require("numpy", extra="eval", purpose="reading joints")
    io: Any = require("scipy.io", extra="eval", purpose="reading .mat files")
    try:
        positions = io.loadmat(path, variable_names=["pos_img"])["pos_img"]
    except Exception as error:  # what SciPy raises for a damaged file is not documented
        raise FrameError(f"{path} cannot be read as a MATLAB file: {error}") from error
    xy: NDArray[np.float64] = np.moveaxis(positions.astype(np.float64), (0, 1, 2), (2, 1, 0))
    return xy


def _keypoint_folders(root: Path) -> list[Path]:
    if (root / NAME).is_file():
        return [root.resolve()]
    folders = [root / name for name in entries(root) if (root / name / NAME).is_file()]
    if not folders:
        raise FrameError(
            f"{root} is not {WHAT}, nor are there clips with {NAME} in it; found {found_in(root)}."
            + nearby(root, ["Rename_Images", "joint_positions"], called="jhmdb")
        )
    return folders


def _json_clip(folder: Path) -> JhmdbClip:
    frames = images_in(folder / "frames")
    path = folder / NAME
    problem = None
    try:
        content = read_keypoints(path)
    except FrameError as error:
        problem = f"JHMDB clip {folder.name!r}: {error}"
    else:
        if content.frames != tuple(range(len(frames))) or content.names != JHMDB_JOINTS:
            problem = (
                f"JHMDB clip {folder.name!r}: {path} has {len(content.names)} joints of "
                f"{len(content.frames)} frames, expected JHMDB's {len(JHMDB_JOINTS)} of each of "
                f"the {len(frames)} images in {folder / 'frames'}"
            )
    return JhmdbClip(
        folder.name, frames, path, tuple(range(len(frames))), JHMDB_JOINTS, problem=problem
    )
