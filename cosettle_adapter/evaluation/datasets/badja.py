"""Reading BADJA: animals in clips of DAVIS, with 20 joints on about every fifth frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets.clips import JointClip, Joints
from cosettle_adapter.evaluation.datasets.images import image_size, read_labels
from cosettle_adapter.evaluation.datasets.keypoint_files import NAME, read_json, read_keypoints
from cosettle_adapter.evaluation.datasets.layout import (
    entries,
    existing_folder,
    few,
    found_in,
    images_in,
    nearby,
    pick,
)
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The joints of the SMAL animal model that are annotated, by their place in BADJA's files.
BADJA_JOINTS = {
    "upper_right_1": 8,
    "upper_right_2": 9,
    "upper_right_3": 10,
    "upper_left_1": 12,
    "upper_left_2": 13,
    "upper_left_3": 14,
    "neck_lower": 15,
    "lower_right_1": 18,
    "lower_right_2": 19,
    "lower_right_3": 20,
    "lower_left_1": 22,
    "lower_left_2": 23,
    "lower_left_3": 24,
    "tail_0": 25,
    "tail_3": 28,
    "tail_6": 31,
    "jaw": 32,
    "nose": 33,
    "right_ear": 35,
    "left_ear": 36,
}
_IN_FILE = 37  # positions a frame in BADJA's files
_RESOLUTION = "480p"  # of DAVIS, for keypoint files
WHAT = "the folder of BADJA that holds joint_annotations, DAVIS and extra_videos"


@dataclasses.dataclass(frozen=True)
class BadjaClip(JointClip):
    """One clip of BADJA, read when asked: all frames from the first annotated to the last.

    Attributes:
        segmentations: paths of the animal's masks, one for every annotated frame.
    """

    segmentations: tuple[Path, ...]

    def read_joints(self) -> Joints:
        """Read the 20 joints of every annotated frame.

        Positions are (x, y) pixels of the clip's frames; the file's (row, col) are turned round,
        and neither file says whether a whole number is a pixel's corner or its centre.

        Raises:
            FrameError: the clip has a problem, or the file is not what it should be.
        """
        self.check()
        np: Any = require("numpy", extra="eval", purpose="reading joints")
        if self.joints_file.name != NAME:
            xy, visible = _official_joints(_official(self.joints_file))
            return Joints(xy, visible)
        content = read_keypoints(self.joints_file)
        height, width = image_size(self.frames[0])
        scale = np.array([width / content.size[1], height / content.size[0]])
        return Joints(content.xy * scale, content.visible)

    def read_areas(self) -> NDArray[np.float64]:
        """Count the pixels of the animal in every annotated frame.

        Returns:
            ``(A,)`` pixels of the clip's frame size: a mask's share of its image times the
            frame's height and width. All values above 0 are the animal, as in the published
            evaluations, so a rider counts too.

        Raises:
            FrameError: the clip has a problem, or a mask is missing or damaged.
        """
        self.check()
        np: Any = require("numpy", extra="eval", purpose="reading masks")
        height, width = image_size(self.frames[0])
        shares = [(read_labels(path, colours=True) > 0).mean() for path in self.segmentations]
        areas: NDArray[np.float64] = np.array(shares, dtype=np.float64) * (height * width)
        return areas


def badja_clips(
    root: str | Path, *, clips: Sequence[str] | None = None, davis: str | Path | None = None
) -> list[BadjaClip]:
    """List the clips of BADJA.

    The official layout is ``joint_annotations/<clip>.json``, each a list of ``{"image_path",
    "segmentation_path", "joints", "visibility"}`` with paths below the root, ``DAVIS/...`` at full
    resolution and ``extra_videos/...``. A folder of ``<clip>/keypoints.json`` is taken as well;
    its frame numbers are those of the clip of that name in a folder of DAVIS at 480p.

    Args:
        root: the folder that holds ``joint_annotations``, or folders with ``keypoints.json``.
        clips: names of the clips wanted; by default all.
        davis: the folder of DAVIS (with ``JPEGImages``); by default ``DAVIS`` in the root, and for
            keypoint files also the one folder beside the root that is one.

    Returns:
        The clips by name. One whose frames or masks are missing (``cat_jump`` and ``tiger`` were
        never published) has a ``problem`` and raises it when read.

    Raises:
        FrameError: a folder that should be there is not, or a clip that does not exist.
    """
    root = existing_folder(root, WHAT)
    build: Callable[[Path], BadjaClip]
    if (root / "joint_annotations").is_dir():
        folder = root / "joint_annotations"
        known = {Path(n).stem: folder / n for n in entries(folder) if n.endswith(".json")}
        images = None if davis is None else existing_folder(davis, "the folder of DAVIS")
        build = partial(_from_official, root, images)
    else:
        known = {n: root / n / NAME for n in entries(root) if (root / n / NAME).is_file()}
        if not known:
            raise FrameError(
                f"{root} is not {WHAT}, nor are there clips with {NAME} in it; found "
                f"{found_in(root)}." + nearby(root, ["joint_annotations"], called="badja")
            )
        images = _find_davis(root, davis)
        build = partial(_from_keypoints, images)
    for name in clips or ():
        pick(name, known, f"clip {name!r} in {root}")
    return [_clip(path, build) for name, path in known.items() if clips is None or name in clips]


def _clip(path: Path, build: Callable[[Path], BadjaClip]) -> BadjaClip:
    name = path.parent.name if path.name == NAME else path.stem
    try:
        return build(path)
    except FrameError as error:
        problem = f"BADJA clip {name!r}: {error}"
        return BadjaClip(name, (), path, (), tuple(BADJA_JOINTS), (), problem=problem)


def _from_official(root: Path, davis: Path | None, path: Path) -> BadjaClip:
    rows = _official(path)
    images = [_below(root, row["image_path"], davis) for row in rows]
    masks = tuple(_below(root, row["segmentation_path"], davis) for row in rows)
    return _between(path.stem, path, images, masks, tuple(BADJA_JOINTS))


def _from_keypoints(davis: Path, path: Path) -> BadjaClip:
    name, content = path.parent.name, read_keypoints(path)
    stems = [f"{frame:05d}" for frame in content.frames]
    images = [davis / "JPEGImages" / _RESOLUTION / name / f"{stem}.jpg" for stem in stems]
    masks = tuple(davis / "Annotations" / _RESOLUTION / name / f"{stem}.png" for stem in stems)
    return _between(name, path, images, masks, content.names)


def _between(
    name: str, path: Path, images: list[Path], masks: tuple[Path, ...], joints: tuple[str, ...]
) -> BadjaClip:
    """The clip from its first annotated image to its last, whatever lies between."""
    missing = [str(image) for image in (*images, *masks) if not image.is_file()]
    if missing:
        raise FrameError(
            f"{len(missing)} of its files are missing: {few(missing, 2)}; unpack DAVIS-2017 "
            "trainval and BADJA's extra videos there, or pass davis="
        )
    held = images_in(images[0].parent)
    frames = held[held.index(images[0]) : held.index(images[-1]) + 1]
    index = {frame: i for i, frame in enumerate(frames)}
    if any(image not in index for image in images):
        raise FrameError(f"the frames of {path} are not in order or not all in one folder")
    annotated = tuple(index[image] for image in images)
    return BadjaClip(name, frames, path, annotated, joints, masks)


def _official(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    keys = {"image_path", "segmentation_path", "joints", "visibility"}
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and keys <= set(row) for row in rows)
    ):
        raise FrameError(f"{path} is not a list of objects with {', '.join(sorted(keys))}")
    return rows


def _official_joints(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    np: Any = require("numpy", extra="eval", purpose="reading joints")
    try:
        row_col = np.array([row["joints"] for row in rows], dtype=np.float64)
        visible = np.array([row["visibility"] for row in rows], dtype=bool)
    except (TypeError, ValueError) as error:
        raise FrameError(f"joints and visibility are not numbers and booleans: {error}") from error
    if row_col.shape != (len(rows), _IN_FILE, 2) or visible.shape != row_col.shape[:2]:
        raise FrameError(
            f"got joints of shape {row_col.shape} and visibility of shape {visible.shape}, "
            f"expected ({len(rows)}, {_IN_FILE}, 2) and ({len(rows)}, {_IN_FILE})"
        )
    annotated = list(BADJA_JOINTS.values())
    return row_col[:, annotated, ::-1].copy(), visible[:, annotated]


def _below(root: Path, path: Any, davis: Path | None) -> Path:
    """A path of a file, which must stay below the root; ``DAVIS/`` may be elsewhere."""
    relative = Path(str(path))
    if relative.is_absolute() or ".." in relative.parts:
        raise FrameError(f"{path} leads out of the folder of BADJA; expected a path below it")
    if davis is not None and relative.parts[:1] == ("DAVIS",):
        return davis.joinpath(*relative.parts[1:])
    return root / relative


def _find_davis(root: Path, davis: str | Path | None) -> Path:
    if davis is not None:
        return existing_folder(davis, "the folder of DAVIS")
    around = root.resolve().parent
    beside = [around / name for name in entries(around)]
    found = [path for path in (root / "DAVIS", *beside) if (path / "JPEGImages").is_dir()]
    if len(found) != 1:
        raise FrameError(
            f"found {len(found)} folders of DAVIS (with JPEGImages) in and beside {root}, expected "
            "one; pass davis= with the folder that holds JPEGImages and Annotations"
        )
    return found[0]
