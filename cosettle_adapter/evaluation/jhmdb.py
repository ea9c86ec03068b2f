"""JHMDB: people in short clips, whose 15 joints are propagated as heat maps."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, images_in
from cosettle_adapter.evaluation.images import image_size
from cosettle_adapter.evaluation.points import Pck, pck
from cosettle_adapter.evaluation.protocols import (
    PUBLISHED,
    ClipScores,
    Propagation,
    Protocol,
    save_positions,
)
from cosettle_adapter.imports import require
from cosettle_adapter.video.geometry import Geometry

JHMDB_JOINTS = (
    *("neck", "belly", "face", "right_shoulder", "left_shoulder", "right_hip", "left_hip"),
    *("right_elbow", "left_elbow", "right_knee", "left_knee", "right_wrist", "left_wrist"),
    *("right_ankle", "left_ankle"),
)
KEYPOINTS = "keypoints.json"
WHAT = "the folder of JHMDB that holds Rename_Images, joint_positions and splits"
_THRESHOLDS = (0.1, 0.2)
_SIGMA = 0.5  # patches
_REACH = 2  # patches that are drawn around a joint: 3 sigma, in whole patches
_BEST = 5  # patches whose centroid is a joint's position


class Joints(NamedTuple):
    """Annotated joints of a clip, one row for every annotated frame."""

    names: tuple[str, ...]
    xy: NDArray[np.float64]  # (A, J, 2) (x, y) pixels of the frames; any value where not visible
    visible: NDArray[np.bool_]  # (A, J)
    areas: NDArray[np.float64] | None = None  # (A,) pixels that show the whole animal


def jhmdb_clips(
    root: str | Path, *, split: int = 1, clips: Sequence[str] | None = None
) -> list[Clip[Joints]]:
    """List the test clips of a split (1, 2 or 3) with :class:`Joints` of every frame.

    The official layout is ``Rename_Images/<class>/<clip>/*.png``,
    ``joint_positions/<class>/<clip>/joint_positions.mat`` with ``pos_img`` of shape (2, 15, T),
    and ``splits/<class>_test_split<n>.txt`` with ``<clip>.avi 1`` (train) or ``2`` (test) a line.
    Frames beyond T, which some clips have, are left out. Published figures use the 268 clips of
    split 1. A folder of clips with ``frames/`` and ``keypoints.json`` is taken as well, without
    splits. Files count pixels from 1, so 0.5 is subtracted, for pixel (0, 0) has its centre at
    (0.5, 0.5) here. (The published evaluation subtracts 1 and takes a pixel's centre as a whole
    number.) Visible are joints inside the frame; the published measure counts joints outside too.

    Raises:
        FrameError: a folder or list that should be there is not, or a clip that is not listed.
    """
    root = folders.data_folder(root, WHAT)
    official = (root / "Rename_Images").is_dir() or (root / "joint_positions").is_dir()
    if official:
        folders.data_folder(root, WHAT, ["Rename_Images", "joint_positions", "splits"])
        kinds = _listed(root / "splits", f"_test_split{split}.txt")
    else:
        paths = folders.clip_folders(root, WHAT, [KEYPOINTS], ["Rename_Images", "joint_positions"])

    def make(name: str) -> Clip[Joints]:
        if official:
            images = root / "Rename_Images" / kinds[name] / name
            path = root / "joint_positions" / kinds[name] / name / "joint_positions.mat"
            xy = _read_mat(path)
        else:
            images, path = paths[name] / "frames", paths[name] / KEYPOINTS
            (names, xy, *_), _, numbers = read_keypoints(path)
            if names != JHMDB_JOINTS or numbers != list(range(len(numbers))):
                raise FrameError(f"{path} must have JHMDB's 15 joints, for every frame from 0 on")
        frames = images_in(images)
        if len(frames) < len(xy) or (len(frames) > len(xy) and not official):
            raise FrameError(f"joints for {len(xy)} frames, but {images} holds {len(frames)}")
        frames, xy = frames[: len(xy)], xy - 0.5

        def read() -> Joints:
            height, width = image_size(frames[0])
            inside = np.asarray(((xy >= 0) & (xy <= [width, height])).all(2))
            return Joints(JHMDB_JOINTS, xy, inside)

        return Clip(name, frames, read, tuple(range(len(frames))), (*frames, path))

    return folders.list_clips("JHMDB clip", root, kinds if official else paths, clips, make)


def jhmdb_protocol(
    data: Path, *, clips: Sequence[str] | None = None, propagation: Propagation = PUBLISHED
) -> Protocol[Joints]:
    """Return the benchmark on JHMDB: PCK, pooled over all frames of all clips but their first."""

    def score(
        clip: Clip[Joints], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate a heat map for every joint; positions are those of the original frames."""
        truth = clip.read_annotations().xy
        start = geometry.pixels_to_cells(torch.from_numpy(truth[0]))
        places, found = propagate_joints(features, start, **propagation.options())
        guess = geometry.cells_to_pixels(places.double().cpu()).numpy()
        save_positions(guess, predictions)
        counted = pck(truth, guess, _THRESHOLDS, visible=found.cpu().numpy())
        counts = {"correct": counted.correct.tolist(), "total": counted.total.tolist()}
        return ClipScores(named(counted), counts)

    def total(scores: Sequence[ClipScores]) -> dict[str, float]:
        counts = [(np.array(c.counts["correct"]), np.array(c.counts["total"])) for c in scores]
        return named(functools.reduce(operator.add, (Pck(_THRESHOLDS, *each) for each in counts)))

    def named(counted: Pck) -> dict[str, float]:
        return {f"PCK@{threshold:g}": share for threshold, share in counted.mean.items()}

    return Protocol(
        name="jhmdb",
        measures=tuple(f"PCK@{threshold:g}" for threshold in _THRESHOLDS),
        clips=lambda: jhmdb_clips(data, clips=clips),
        size=lambda _: (320, 320),
        score=score,
        settings=propagation.options(),
        total=total,
    )


def propagate_joints(features: Tensor, places: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Carry joints ``(J, 2)``, fractional (row, col), through a clip by features ``(T, C, h, w)``.

    Options are those of :func:`~cosettle_adapter.correspondence.propagate_labels`.

    Returns:
        ``(T, J, 2)`` fractional (row, col) and ``(T, J)`` whether a joint is still to be seen.
    """
    height, width = features.shape[-2:]
    heat = joint_heat_maps(places, (height, width)).to(features.device)
    return decode_joints(propagate_labels(features, heat, **options))


def joint_heat_maps(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Draw a Gaussian, sigma half a patch, for joints ``(J, 2)`` at fractional (row, col).

    Returns:
        ``(J, h, w)`` float32, 1 where a joint lies on a patch's centre, 0 more than two patches
        away: a joint well outside the frame leaves its map empty.
    """
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in grid)
    row, column = places.float().unbind(-1)
    down = rearrange(rows, "h -> 1 h 1") - rearrange(row, "j -> j 1 1")
    right = rearrange(columns, "w -> 1 1 w") - rearrange(column, "j -> j 1 1")
    near = (down.abs() <= _REACH) & (right.abs() <= _REACH)
    return torch.exp(-(down**2 + right**2) / (2 * _SIGMA**2)) * near


def decode_joints(heat_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Read positions out of maps ``(..., J, h, w)``: the centroid of the five strongest patches.

    Returns:
        ``(..., J, 2)`` fractional (row, col), and ``(..., J)`` whether a map is not all empty.
    """
    width = heat_maps.shape[-1]
    flat = rearrange(heat_maps, "... h w -> ... (h w)")
    weights, index = flat.topk(min(_BEST, flat.shape[-1]), dim=-1)
    found = weights.sum(-1) > 0
    share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    places = torch.stack([index // width, index % width], dim=-1).to(share)
    return reduce(share[..., None] * places, "... k two -> ... two", "sum"), found


def read_keypoints(path: Path) -> tuple[Joints, tuple[int, int], list[int]]:
    """Read the joints of a keypoint file, the (height, width) they are in, and their frames."""
    content = read_json(path)
    try:
        names = tuple(str(name) for name in content["keypoint_names"])
        size = int(content["height"]), int(content["width"])
        rows = sorted(content["annotations"], key=lambda row: int(row["frame"]))
        frames = [int(row["frame"]) for row in rows]
        xy = np.array([row["xy"] for row in rows], dtype=np.float64)
        visible = np.array([row["visible"] for row in rows])
        if xy.shape != (len(rows), len(names), 2) or visible.shape != xy.shape[:2] or not rows:
            raise ValueError(f"xy of shape {xy.shape} and visible of shape {visible.shape}")
        if visible.dtype != np.bool_ or len(set(frames)) != len(frames):
            raise ValueError("visible that is not true or false, or a frame that is there twice")
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(
            f"{path} is not a keypoint file ({type(error).__name__}: {error}); expected "
            '{"keypoint_names", "width", "height", "annotations": [{"frame", "xy", "visible"}]}, '
            "an [x, y] and a true or false for every name"
        ) from error
    return Joints(names, xy, visible), size, frames


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FrameError(f"{path} cannot be read as JSON: {error}") from error


def _listed(folder: Path, ending: str) -> dict[str, str]:
    """Clip to class, of the clips to test on."""
    found = {
        words[0].removesuffix(".avi"): path.name.removesuffix(ending)
        for path in sorted(folder.glob(f"*{ending}"))
        for words in map(str.split, path.read_text().splitlines())
        if words[1:] == ["2"]
    }
    if not found:
        raise FrameError(
            f"no lists in {folder}: expected <class>{ending}, found {folders.found_in(folder)}; "
            "unpack splits.zip there"
        )
    return found


def _read_mat(path: Path) -> NDArray[np.float64]:
    """``(T, 15, 2)`` (x, y), the first pixel's centre at 1."""
    io: Any = require("scipy.io", extra="eval", purpose="reading .mat files")
    if not path.is_file():
        raise FrameError(f"no {path}; unpack joint_positions.zip")
    try:
        xy = np.asarray(io.loadmat(path)["pos_img"], dtype=np.float64)
    except Exception as error:  # what SciPy raises for a damaged file is not documented
        raise FrameError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if xy.ndim != 3 or xy.shape[:2] != (2, len(JHMDB_JOINTS)):
        raise FrameError(f"{path} has pos_img of shape {xy.shape}, expected (2, 15, T)")
    return rearrange(xy, "two j t -> t j two")
