"""BADJA: animals in clips of DAVIS whose 20 joints, on about every fifth frame, are tracked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import (
    Clip,
    bad_clip,
    data_folder,
    entries,
    few,
    files_named,
    found_in,
    images_in,
    label_maps_in,
    nearby,
    pick,
)
from cosettle_adapter.evaluation.images import image_size, read_labels
from cosettle_adapter.evaluation.joints import KEYPOINTS, Joints, read_json, read_keypoints
from cosettle_adapter.evaluation.keypoints import badja_accuracy
from cosettle_adapter.evaluation.protocols import ClipScores, Protocol, save_positions
from cosettle_adapter.evaluation.tracking import track_queries

if TYPE_CHECKING:
    from torch import Tensor

    from cosettle_adapter.video.geometry import Geometry

# joints of the SMAL animal model that are annotated, by their place in BADJA's files
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
_DAVIS = ("JPEGImages", "Annotations")
_RESOLUTION = "480p"  # of DAVIS, for keypoint files
_KEYS = {"image_path", "segmentation_path", "joints", "visibility"}
WHAT = "the folder of BADJA that holds joint_annotations, DAVIS and extra_videos"
WHAT_DAVIS = "the folder of DAVIS"


def badja_clips(
    root: str | Path, *, clips: Sequence[str] | None = None, davis: str | Path | None = None
) -> list[Clip[Joints]]:
    """List the clips of BADJA, each all frames from the first annotated to the last.

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
        The clips by name. Annotations are :class:`Joints` with areas: a mask's share of its image
        times the frame's size, where all values above 0 are the animal, as in the published
        evaluations, so a rider counts too. (Neither file says whether a whole number is a pixel's
        corner or its centre.) ``cat_jump`` and ``tiger`` were never published in full.

    Raises:
        FrameError: a folder that should be there is not, or a clip that does not exist.
    """
    root = data_folder(root, WHAT)
    folder = root / "joint_annotations"
    if folder.is_dir():
        known = {Path(n).stem: folder / n for n in entries(folder) if n.endswith(".json")}
        images = None if davis is None else data_folder(davis, WHAT_DAVIS)
    else:
        known = {n: root / n / KEYPOINTS for n in entries(root) if (root / n / KEYPOINTS).is_file()}
        if not known:
            raise FrameError(
                f"{root} is not {WHAT}, nor are there clips with {KEYPOINTS} in it; found "
                f"{found_in(root)}." + nearby(root, ["joint_annotations"])
            )
        images = _find_davis(root) if davis is None else data_folder(davis, WHAT_DAVIS)
    wanted = set(pick(clips, known, f"clip {{}} in {root}"))
    found = []
    for name, path in known.items():
        if name in wanted:
            try:
                found.append(_clip(name, path, root, images))
            except FrameError as error:
                found.append(bad_clip(name, f"BADJA clip {name!r}: {error}"))
    return found


def badja_protocol(
    data: Path, *, clips: Sequence[str] | None = None, davis: Path | None = None
) -> Protocol[Joints]:
    """Return the benchmark on BADJA: every joint is tracked from where it is first seen."""

    def score(
        clip: Clip[Joints], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Frames before a joint's first annotation do not count."""
        joints, annotated = clip.read_annotations(), np.asarray(clip.annotated)
        seen, first = joints.visible.any(0), joints.visible.argmax(0)
        where = joints.xy[first[seen], seen.nonzero()[0]]
        tracks = track_queries(features, annotated[first[seen]], torch.from_numpy(where), geometry)
        guess = np.zeros_like(joints.xy)
        guess[:, seen] = rearrange(tracks.xy, "q t two -> t q two").numpy()[annotated]
        save_positions(guess, predictions)
        if joints.areas is None:
            raise FrameError(f"{clip.name} has no areas of its animal, by which BADJA scales")
        found = badja_accuracy(joints.xy, guess, joints.visible, joints.areas, query_frames=first)
        return ClipScores({"delta_seg": found.delta_seg, "delta_3px": found.delta_3px})

    return Protocol(
        name="badja",
        measures=("delta_seg", "delta_3px"),
        clips=lambda: badja_clips(data, clips=clips, davis=davis),
        size=lambda _: (480, 880),  # as for DAVIS, from which the clips are
        score=score,
        settings={"tracking": "nearest neighbour", "queries": "where a joint is first annotated"},
    )


def _clip(name: str, path: Path, root: Path, davis: Path | None) -> Clip[Joints]:
    """The clip from its first annotated image to its last, whatever lies between."""
    official = path.name != KEYPOINTS
    if official:
        rows = _official(path)
        images = [_below(root, row["image_path"], davis) for row in rows]
        masks = [_below(root, row["segmentation_path"], davis) for row in rows]
    else:
        content = read_keypoints(path)
        stems = [f"{frame:05d}" for frame in content.frames]
        folders = [(davis or root) / kind / _RESOLUTION / name for kind in _DAVIS]
        images = files_named(stems, images_in(folders[0]), folders[0] / "*.jpg")
        masks = files_named(stems, label_maps_in(folders[1]), folders[1] / "*.png")
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
    height, width = image_size(frames[0])
    if official:
        joints = _official_joints(rows)
    else:
        scale = np.array([width / content.size[1], height / content.size[0]])
        joints = Joints(content.names, content.xy * scale, content.visible)

    def read() -> Joints:
        shares = [(read_labels(mask, colours=True) > 0).mean() for mask in masks]
        return joints._replace(areas=np.array(shares) * (height * width))

    annotated = tuple(index[image] for image in images)
    return Clip(name, frames, read, annotated, (*frames, *masks, path))


def _official(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and set(row) >= _KEYS for row in rows)
    ):
        raise FrameError(f"{path} is not a list of objects with {', '.join(sorted(_KEYS))}")
    return rows


def _official_joints(rows: list[dict[str, Any]]) -> Joints:
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
    xy = row_col[:, annotated, ::-1].copy()
    return Joints(tuple(BADJA_JOINTS), xy, visible[:, annotated])


def _below(root: Path, path: Any, davis: Path | None) -> Path:
    """A path of a file, which must stay below the root; ``DAVIS/`` may be elsewhere."""
    relative = Path(str(path))
    if relative.is_absolute() or ".." in relative.parts:
        raise FrameError(f"{path} leads out of the folder of BADJA; expected a path below it")
    if davis is not None and relative.parts[:1] == ("DAVIS",):
        return davis.joinpath(*relative.parts[1:])
    return root / relative


def _find_davis(root: Path) -> Path:
    around = root.resolve().parent
    candidates = [root / "DAVIS", *(around / name for name in entries(around))]
    found = [path for path in candidates if (path / "JPEGImages").is_dir()]
    if len(found) != 1:
        raise FrameError(
            f"found {len(found)} folders of DAVIS (with JPEGImages) in and beside {root}, expected "
            "one; pass davis= with the folder that holds JPEGImages and Annotations"
        )
    return found[0]
