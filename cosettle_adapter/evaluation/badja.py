"""BADJA: animals in clips of DAVIS whose 20 joints, on about every fifth frame, are tracked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, images_in, images_named
from cosettle_adapter.evaluation.images import image_size, read_labels
from cosettle_adapter.evaluation.jhmdb import KEYPOINTS, Joints, read_json, read_keypoints
from cosettle_adapter.evaluation.points import badja_accuracy, track_queries
from cosettle_adapter.evaluation.protocols import ClipScores, Protocol, save_positions
from cosettle_adapter.video.geometry import Geometry

# joints of the SMAL animal model that are annotated, by their place in BADJA's files
_NAMES = """
    upper_right_1 upper_right_2 upper_right_3 upper_left_1 upper_left_2 upper_left_3 neck_lower
    lower_right_1 lower_right_2 lower_right_3 lower_left_1 lower_left_2 lower_left_3
    tail_0 tail_3 tail_6 jaw nose right_ear left_ear
"""
_PLACES = (8, 9, 10, 12, 13, 14, 15, 18, 19, 20, 22, 23, 24, 25, 28, 31, 32, 33, 35, 36)
BADJA_JOINTS = dict(zip(_NAMES.split(), _PLACES, strict=True))
_IN_FILE = 37  # positions a frame in BADJA's files
_RESOLUTION = "480p"  # of DAVIS, for keypoint files
WHAT = "the folder of BADJA that holds joint_annotations, DAVIS and extra_videos"


def badja_clips(
    root: str | Path, *, clips: Sequence[str] | None = None, davis: str | Path | None = None
) -> list[Clip[Joints]]:
    """List clips with :class:`Joints`, each all frames from the first annotated to the last.

    The official layout is ``joint_annotations/<clip>.json``, each a list of ``{"image_path",
    "segmentation_path", "joints", "visibility"}`` with paths below the root, ``DAVIS/...`` at full
    resolution and ``extra_videos/...``. A folder of ``<clip>/keypoints.json`` is taken as well;
    its frame numbers are those of the clip of that name in DAVIS at 480p. DAVIS is the folder of
    that name in the root, or ``davis``. ``cat_jump`` and ``tiger`` were never published in full.

    Areas are a mask's share of its image times the frame's size; all values above 0 are the animal,
    as in the published evaluations, so a rider counts too. (No file says whether a whole number is
    a pixel's corner or its centre.)

    Raises:
        FrameError: a folder that should be there is not, or a clip that does not exist.
    """
    root = folders.data_folder(root, WHAT)
    images = root / "DAVIS" if davis is None else folders.data_folder(davis, "the folder of DAVIS")
    known = {path.stem: path for path in sorted(root.glob("joint_annotations/*.json"))}
    if not known:
        found = folders.clip_folders(root, WHAT, [KEYPOINTS], ["joint_annotations"])
        known = {name: path / KEYPOINTS for name, path in found.items()}

    return folders.list_clips(
        "BADJA clip", root, known, clips, lambda name: _clip(name, known[name], root, images)
    )


def badja_protocol(
    data: Path, *, clips: Sequence[str] | None = None, davis: Path | None = None
) -> Protocol[Joints]:
    """Return the benchmark on BADJA: every joint is tracked from where it is first seen."""

    def score(
        clip: Clip[Joints], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Frames up to a joint's first annotation do not count."""
        joints, annotated = clip.read_annotations(), np.asarray(clip.annotated)
        seen, first = joints.visible.any(0), joints.visible.argmax(0)
        where = torch.from_numpy(joints.xy[first[seen], seen.nonzero()[0]])
        tracks, _ = track_queries(features, annotated[first[seen]], where, geometry)
        guess = np.zeros_like(joints.xy)
        guess[:, seen] = rearrange(tracks, "q t two -> t q two").numpy()[annotated]
        save_positions(guess, predictions)
        later = joints.visible & (np.arange(len(annotated))[:, None] > first)
        assert joints.areas is not None
        found = badja_accuracy(joints.xy, guess, later, joints.areas)
        return ClipScores({"delta_seg": found.delta_seg, "delta_3px": found.delta_3px})

    return Protocol(
        name="badja",
        measures=("delta_seg", "delta_3px"),
        clips=lambda: badja_clips(data, clips=clips, davis=davis),
        size=lambda _: (480, 880),  # as for DAVIS, from which the clips are
        score=score,
        settings={"tracking": "nearest neighbour", "queries": "where a joint is first annotated"},
    )


def _clip(name: str, path: Path, root: Path, davis: Path) -> Clip[Joints]:
    """The clip from its first annotated image to its last, whatever lies between."""
    size = None
    if path.name == KEYPOINTS:
        joints, size, numbers = read_keypoints(path)
        stems = [f"{number:05d}" for number in numbers]
        images = images_named(davis / "JPEGImages" / _RESOLUTION / name, stems)
        masks = images_named(davis / "Annotations" / _RESOLUTION / name, stems, lossless=True)
    else:
        joints, images, masks = _official(path, root, davis)
    missing = [str(image) for image in (*images, *masks) if not image.is_file()]
    if missing:
        raise FrameError(
            f"{len(missing)} of its files are missing: {folders.few(missing, 2)}; unpack "
            "DAVIS-2017 trainval and BADJA's extra videos there, or pass davis="
        )
    frames = images_in(images[0].parent)
    frames = frames[frames.index(images[0]) : frames.index(images[-1]) + 1]
    index = {frame: i for i, frame in enumerate(frames)}
    if any(image not in index for image in images):
        raise FrameError(f"the frames of {path} are not in order or not all in one folder")
    height, width = image_size(frames[0])
    if size is not None:
        joints = joints._replace(xy=joints.xy * [width / size[1], height / size[0]])

    def read() -> Joints:
        shares = [(read_labels(mask, colours=True) > 0).mean() for mask in masks]
        return joints._replace(areas=np.array(shares) * (height * width))

    annotated = tuple(index[image] for image in images)
    return Clip(name, frames, read, annotated, (*frames, *masks, path))


def _official(path: Path, root: Path, davis: Path) -> tuple[Joints, list[Path], list[Path]]:
    rows = read_json(path)
    try:
        images = [_below(root, row["image_path"], davis) for row in rows]
        masks = [_below(root, row["segmentation_path"], davis) for row in rows]
        row_col = np.array([row["joints"] for row in rows], dtype=np.float64)
        visible = np.array([row["visibility"] for row in rows], dtype=bool)
        if row_col.shape != (len(rows), _IN_FILE, 2) or visible.shape != row_col.shape[:2]:
            raise ValueError(f"joints of shape {row_col.shape}, visibility of {visible.shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(
            f"{path} is not a list of objects with image_path, segmentation_path, and joints and "
            f"visibility of {_IN_FILE} joints ({type(error).__name__}: {error})"
        ) from error
    annotated = list(BADJA_JOINTS.values())
    xy = row_col[:, annotated, ::-1].copy()
    return Joints(tuple(BADJA_JOINTS), xy, visible[:, annotated]), images, masks


def _below(root: Path, path: str, davis: Path) -> Path:
    """A path of a file, which must stay below the root; ``DAVIS/`` may be elsewhere."""
    relative = Path(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise FrameError(f"{path} leads out of the folder of BADJA; expected a path below it")
    inside = relative.parts[:1] == ("DAVIS",)
    return davis.joinpath(*relative.parts[1:]) if inside else root / relative
