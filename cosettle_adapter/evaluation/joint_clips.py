"""Clips with joints: JHMDB (15 joints, propagated as heat maps) and BADJA (20 joints, tracked).

JHMDB shows people in short clips; BADJA shows animals, mostly in clips of DAVIS, and annotates
about every fifth frame. Both can also be read from folders of clips with keypoint files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, images_named
from cosettle_adapter.evaluation.points import Pck, badja_accuracy, pck, track_queries
from cosettle_adapter.evaluation.protocols import DEFAULT, JointRule, LabelPropagation
from cosettle_adapter.evaluation.run import ClipScores, Protocol, save_positions
from cosettle_adapter.imports import require
from cosettle_adapter.video.geometry import Geometry

JHMDB_JOINTS = (
    *("neck", "belly", "face", "right_shoulder", "left_shoulder", "right_hip", "left_hip"),
    *("right_elbow", "left_elbow", "right_knee", "left_knee", "right_wrist", "left_wrist"),
    *("right_ankle", "left_ankle"),
)
# annotated joints of the SMAL animal model, and their indices in BADJA's files
_NAMES = """
    upper_right_1 upper_right_2 upper_right_3 upper_left_1 upper_left_2 upper_left_3 neck_lower
    lower_right_1 lower_right_2 lower_right_3 lower_left_1 lower_left_2 lower_left_3
    tail_0 tail_3 tail_6 jaw nose right_ear left_ear
"""
_INDICES = (8, 9, 10, 12, 13, 14, 15, 18, 19, 20, 22, 23, 24, 25, 28, 31, 32, 33, 35, 36)
BADJA_JOINTS = dict(zip(_NAMES.split(), _INDICES, strict=True))
_IN_FILE = 37  # positions per frame in BADJA's files
KEYPOINTS = "keypoints.json"
JHMDB = "the folder of JHMDB that holds Rename_Images, joint_positions and splits"
BADJA = "the folder of BADJA that holds joint_annotations, DAVIS and extra_videos"
_JHMDB_PARTS = ("Rename_Images", "joint_positions", "splits")
_THRESHOLDS = (0.1, 0.2)
_SIGMA = 0.5  # patches
_REACH = 2  # patches drawn around a joint: 3 sigma, rounded up
_BADJA_SIZE = (480, 880)  # as for DAVIS, the source of most clips
QueryFrames = Literal["published", "strict"]


class Joints(NamedTuple):
    """Annotated joints of a clip, one row per annotated frame."""

    names: tuple[str, ...]
    xy: NDArray[np.float64]  # (A, J, 2) (x, y) pixels of the frames; undefined where not visible
    visible: NDArray[np.bool_]  # (A, J)
    areas: NDArray[np.float64] | None = None  # (A,) pixels of the animal's mask


def jhmdb_clips(
    root: str | Path, *, split: int = 1, clips: Sequence[str] | None = None
) -> list[Clip[Joints]]:
    """List the test clips of a split (1, 2 or 3) with :class:`Joints` of every frame.

    The official layout is ``Rename_Images/<class>/<clip>/*.png``,
    ``joint_positions/<class>/<clip>/joint_positions.mat`` with ``pos_img`` of shape (2, 15, T),
    and ``splits/<class>_test_split<n>.txt`` with lines ``<clip>.avi 1`` (train) or ``2`` (test).
    Frames beyond T, which some clips have, are left out. Published figures use the 268 clips of
    split 1. A folder of clips with ``frames/`` and ``keypoints.json``, without splits, works too.

    The files count pixels from 1, and the centre of pixel (0, 0) is (0.5, 0.5) here, so 0.5 is
    subtracted. (The published evaluation subtracts 1 and puts pixel centres at whole numbers.)
    Joints inside the frame are visible; the published measure also counts joints outside.
    """
    root = folders.data_folder(root, JHMDB)
    official = any((root / part).is_dir() for part in _JHMDB_PARTS[:2])
    if official:
        folders.data_folder(root, JHMDB, _JHMDB_PARTS)
        known = _listed(root / "splits", f"_test_split{split}.txt")
    else:
        known = folders.clip_folders(root, JHMDB, [KEYPOINTS], _JHMDB_PARTS[:2])

    def make(name: str) -> Clip[Joints]:
        if official:
            images = root / "Rename_Images" / known[name]
            path = root / "joint_positions" / known[name] / "joint_positions.mat"
            xy = _read_mat(path)
        else:
            images, path = known[name] / "frames", known[name] / KEYPOINTS
            joints, _, numbers = read_keypoints(path)
            xy = joints.xy
            if joints.names != JHMDB_JOINTS or numbers != list(range(len(numbers))):
                raise FrameError(f"{path} must have JHMDB's 15 joints, for every frame from 0 on")
        frames = folders.images_in(images)
        if len(frames) < len(xy) or (len(frames) > len(xy) and not official):
            raise FrameError(f"joints for {len(xy)} frames, but {images} holds {len(frames)}")
        frames, xy = frames[: len(xy)], xy - 0.5

        def read() -> Joints:
            height, width = folders.image_size(frames[0])
            inside = np.asarray(((xy >= 0) & (xy <= [width, height])).all(2))
            return Joints(JHMDB_JOINTS, xy, inside)

        return Clip(name, frames, read, tuple(range(len(frames))), (*frames, path))

    return folders.list_clips("JHMDB clip", root, known, clips, make)


def jhmdb_protocol(
    data: Path,
    *,
    clips: Sequence[str] | None = None,
    joints: JointRule | None = None,
    propagation: LabelPropagation = DEFAULT,
) -> Protocol[Joints]:
    """Return the benchmark on JHMDB: PCK, pooled over all clips without their first frames.

    ``joints`` overrides the protocol's rule (:func:`joint_heat_maps`).
    """
    record = propagation.on("jhmdb", joints=joints)

    def score(
        clip: Clip[Joints], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate one heat map per joint; positions are pixels of the original frames."""
        truth = clip.read_annotations().xy
        shift = torch.zeros(2, dtype=torch.float64)  # in patches, along rows and columns
        if record.joints == "published":  # patch k is at pixel k * patch, not half a patch later
            grid, frame = (torch.tensor(sides) for sides in (geometry.grid, geometry.frame))
            shift += 0.5 - 0.5 * grid / frame
        places = geometry.pixels_to_cells(torch.from_numpy(truth[0])) + shift
        maps = joint_heat_maps(places, geometry.grid, record.joints).to(features.device)
        labels = propagate_labels(features, maps, protocol=record)
        patches, visible = decode_joints(labels, record.strongest)
        guess = geometry.cells_to_pixels(patches.double().cpu() - shift).numpy()
        save_positions(guess, predictions)
        result = pck(truth, guess, _THRESHOLDS, visible=visible.cpu().numpy())
        counts = {"correct": result.correct.tolist(), "total": result.total.tolist()}
        return ClipScores(figures(result), counts)

    def total(scores: Sequence[ClipScores]) -> dict[str, float]:
        clips = [
            Pck(_THRESHOLDS, np.array(clip.counts["correct"]), np.array(clip.counts["total"]))
            for clip in scores
        ]
        return figures(sum(clips[1:], start=clips[0]))

    def figures(result: Pck) -> dict[str, float]:
        return {f"PCK@{threshold:g}": share for threshold, share in result.mean.items()}

    return Protocol(
        name="jhmdb",
        measures=tuple(f"PCK@{threshold:g}" for threshold in _THRESHOLDS),
        clips=lambda: jhmdb_clips(data, clips=clips),
        size=record.frame_size,
        score=score,
        settings=record.settings("first_labels", "argmax", "stretch", "nearest"),
        total=total,
        preprocess=record.preprocess,
    )


def badja_clips(
    root: str | Path, *, clips: Sequence[str] | None = None, davis: str | Path | None = None
) -> list[Clip[Joints]]:
    """List clips with :class:`Joints`; a clip spans the first to the last annotated frame.

    The official layout is ``joint_annotations/<clip>.json``, each a list of ``{"image_path",
    "segmentation_path", "joints", "visibility"}`` with paths below the root, ``DAVIS/...`` at full
    resolution and ``extra_videos/...``. A folder of ``<clip>/keypoints.json`` works too; its frame
    numbers refer to the clip of that name in DAVIS at 480p. ``davis`` is the folder of DAVIS, by
    default ``DAVIS`` in the root. ``cat_jump`` and ``tiger`` were never published in full.

    The area is the mask's share of its image times the frame's size. All mask values above 0 are
    the animal, as in the published evaluations, so a rider counts too. (The files do not say
    whether whole numbers are corners or centres of pixels.)
    """
    root = folders.data_folder(root, BADJA)
    images = root / "DAVIS" if davis is None else folders.data_folder(davis, "the folder of DAVIS")
    known = {path.stem: path for path in sorted(root.glob("joint_annotations/*.json"))}
    if not known:
        children = folders.clip_folders(root, BADJA, [KEYPOINTS], ["joint_annotations"])
        known = {name: path / KEYPOINTS for name, path in children.items()}

    return folders.list_clips(
        "BADJA clip", root, known, clips, lambda name: _badja_clip(name, known[name], root, images)
    )


def badja_protocol(
    data: Path,
    *,
    clips: Sequence[str] | None = None,
    davis: Path | None = None,
    query_frames: QueryFrames = "published",
) -> Protocol[Joints]:
    """Return the benchmark on BADJA: every joint is tracked from its first annotation.

    A joint's query frame counts unless it is the clip's first, as in DINO-Tracker's evaluation
    (``published``), or never (``strict``).
    """

    def score(
        clip: Clip[Joints], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Track every joint; frames before its first annotation do not count."""
        joints, annotated = clip.read_annotations(), np.asarray(clip.annotated)
        if joints.areas is None:
            raise FrameError(f"{clip.name!r} has no areas of its animal, which delta_seg needs")
        seen, first = joints.visible.any(0), joints.visible.argmax(0)
        queries = torch.from_numpy(joints.xy[first[seen], seen.nonzero()[0]])
        tracks, _ = track_queries(features, annotated[first[seen]], queries, geometry)
        guess = np.zeros_like(joints.xy)
        guess[:, seen] = rearrange(tracks, "q t two -> t q two").numpy()[annotated]
        save_positions(guess, predictions)
        frames, strict = np.arange(len(annotated))[:, None], query_frames == "strict"
        counted = joints.visible & (frames >= first + strict)
        result = badja_accuracy(joints.xy, guess, counted, joints.areas)
        return ClipScores({"delta_seg": result.delta_seg, "delta_3px": result.delta_3px})

    return Protocol(
        name="badja",
        measures=("delta_seg", "delta_3px"),
        clips=lambda: badja_clips(data, clips=clips, davis=davis),
        size=lambda _: _BADJA_SIZE,
        score=score,
        settings={
            "tracking": "nearest neighbour",
            "queries": "where a joint is first annotated",
            "query_frames": query_frames,
            "size": "{} x {}".format(*_BADJA_SIZE),
        },
    )


def joint_heat_maps(places: Tensor, grid: tuple[int, int], rule: JointRule = "geometric") -> Tensor:
    """Draw joints ``(J, 2)``, fractional (row, col), as Gaussians with a sigma of half a patch.

    ``published``, as in videowalk and CropMAE: the peak is on patch ``int(p - 1.5) + 2``, and the
    Gaussian is truncated at ``int(p - 1.5)`` and ``int(p + 2.5) - 1``, where ``int`` truncates.
    ``geometric``: the peak is at p, and the Gaussian is truncated two patches away.

    Returns:
        ``(J, h, w)`` float32, 1 where a joint's peak is on a patch's centre; empty for a joint well
        outside the frame.
    """
    side = 3 * _SIGMA
    start = (places - side).trunc() if rule == "published" else places - _REACH
    stop = (places + side + 1).trunc() - 1 if rule == "published" else places + _REACH
    profiles = []
    for axis, length in enumerate(grid):
        patches = torch.arange(length, dtype=places.dtype)
        first, last = (rearrange(ends[:, axis], "j -> j 1") for ends in (start, stop))
        gauss = torch.exp(-((patches - first - _REACH) ** 2) / (2 * _SIGMA**2))
        profiles.append(gauss * (patches >= first) * (patches <= last))
    down, across = profiles
    return einsum(down, across, "j h, j w -> j h w").float()


def decode_joints(heat_maps: Tensor, strongest: int = 5) -> tuple[Tensor, Tensor]:
    """Locate joints in maps ``(..., J, h, w)``: the centroid of the strongest patches.

    Returns:
        ``(..., J, 2)`` fractional (row, col), and ``(..., J)`` whether a map has any weight.
    """
    width = heat_maps.shape[-1]
    flat = rearrange(heat_maps, "... h w -> ... (h w)")
    weights, index = flat.topk(min(strongest, flat.shape[-1]), dim=-1)
    visible = weights.sum(-1) > 0
    share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    patches = torch.stack([index // width, index % width], dim=-1).to(share)
    return reduce(share[..., None] * patches, "... k two -> ... two", "sum"), visible


def read_keypoints(path: Path) -> tuple[Joints, tuple[int, int], list[int]]:
    """Read a keypoint file: its joints, the (height, width) of their frames, the frame numbers."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = tuple(str(name) for name in content["keypoint_names"])
        size = int(content["height"]), int(content["width"])
        rows = {int(row["frame"]): row for row in content["annotations"]}
        frames = sorted(rows)
        xy = np.array([rows[frame]["xy"] for frame in frames], dtype=np.float64)
        visible = np.array([rows[frame]["visible"] for frame in frames])
        if len(rows) < len(content["annotations"]):
            raise ValueError("a frame occurs twice")
        expected = (len(rows), len(names))
        if xy.shape != (*expected, 2) or visible.shape != expected or visible.dtype != np.bool_:
            raise ValueError(f"xy of shape {xy.shape}, visible {visible.dtype} {visible.shape}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FrameError(
            f"{path} is not a keypoint file ({type(error).__name__}: {error}); expected "
            '{"keypoint_names", "width", "height", "annotations": [{"frame", "xy", "visible"}]}, '
            "with one [x, y] and one true or false per name"
        ) from error
    return Joints(names, xy, visible), size, frames


def _badja_clip(name: str, path: Path, root: Path, davis: Path) -> Clip[Joints]:
    """Return the clip from its first annotated image to its last."""
    size = None
    if path.name == KEYPOINTS:
        joints, size, numbers = read_keypoints(path)
        stems = [f"{number:05d}" for number in numbers]
        images = images_named(davis / "JPEGImages" / "480p" / name, stems)
        masks = images_named(davis / "Annotations" / "480p" / name, stems, lossless=True)
    else:
        joints, images, masks = _official(path, root, davis)
    missing = [str(image) for image in (*images, *masks) if not image.is_file()]
    if missing:
        raise FrameError(
            f"{len(missing)} of its files are missing: {folders.few(missing, 2)}; unpack "
            "DAVIS-2017 trainval and BADJA's extra videos there, or pass davis= (--davis)"
        )
    frames = folders.images_in(images[0].parent)
    if images != [frame for frame in frames if frame in images]:
        raise FrameError(f"the frames of {path} are not in order or not all in one folder")
    frames = frames[frames.index(images[0]) : frames.index(images[-1]) + 1]
    height, width = folders.image_size(frames[0])
    if size is not None:
        joints = joints._replace(xy=joints.xy * [width / size[1], height / size[0]])

    def read() -> Joints:
        shares = [(folders.read_labels(mask, colours=True) > 0).mean() for mask in masks]
        return joints._replace(areas=np.array(shares) * (height * width))

    annotated = tuple(frames.index(image) for image in images)
    return Clip(name, frames, read, annotated, (*frames, *masks, path))


def _official(path: Path, root: Path, davis: Path) -> tuple[Joints, list[Path], list[Path]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
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
    """Resolve a path below ``root``, or below ``davis`` if it starts with ``DAVIS/``."""
    relative = Path(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise FrameError(f"{path} leads out of the folder of BADJA; expected a path below it")
    inside = relative.parts[:1] == ("DAVIS",)
    return davis.joinpath(*relative.parts[1:]) if inside else root / relative


def _listed(folder: Path, ending: str) -> dict[str, Path]:
    """Return ``<class>/<clip>`` of the test clips by name."""
    clips = {
        name: Path(path.name.removesuffix(ending), name)
        for path in sorted(folder.glob(f"*{ending}"))
        for name in re.findall(r"^(\S+?)(?:\.avi)?[ \t]+2[ \t]*$", folders.read_text(path), re.M)
    }
    if not clips:
        raise FrameError(
            f"no lists in {folder}: expected <class>{ending}, found {folders.found_in(folder)}; "
            "unpack splits.zip there"
        )
    return clips


def _read_mat(path: Path) -> NDArray[np.float64]:
    """Read ``(T, 15, 2)`` (x, y); the first pixel's centre is at 1."""
    io: Any = require("scipy.io", extra="eval", purpose="reading .mat files")
    if not path.is_file():
        raise FrameError(f"no {path}; unpack joint_positions.zip")
    try:
        xy = np.asarray(io.loadmat(path)["pos_img"], dtype=np.float64)
    except Exception as error:  # SciPy does not document its errors for damaged files
        raise FrameError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if xy.ndim != 3 or xy.shape[:2] != (2, len(JHMDB_JOINTS)) or not xy.size:
        raise FrameError(f"{path} has pos_img of shape {xy.shape}, expected (2, 15, T)")
    return rearrange(xy, "two j t -> t j two")
