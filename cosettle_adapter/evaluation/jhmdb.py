"""JHMDB: people in short clips, whose 15 joints are propagated as heat maps."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import (
    Clip,
    bad_clip,
    data_folder,
    entries,
    found_in,
    images_in,
    nearby,
    pick,
)
from cosettle_adapter.evaluation.images import image_size
from cosettle_adapter.evaluation.joints import KEYPOINTS, Joints, read_keypoints
from cosettle_adapter.evaluation.keypoints import Pck, pck
from cosettle_adapter.evaluation.protocols import (
    PUBLISHED,
    ClipScores,
    Propagation,
    Protocol,
    save_positions,
)
from cosettle_adapter.imports import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cosettle_adapter.video.geometry import Geometry

JHMDB_JOINTS = (
    *("neck", "belly", "face", "right_shoulder", "left_shoulder", "right_hip", "left_hip"),
    *("right_elbow", "left_elbow", "right_knee", "left_knee", "right_wrist", "left_wrist"),
    *("right_ankle", "left_ankle"),
)
WHAT = "the folder of JHMDB that holds Rename_Images, joint_positions and splits"
_SUBSETS = {"train": "1", "test": "2"}
_THRESHOLDS = (0.1, 0.2)
_SIGMA = 0.5  # patches
_REACH = 3  # standard deviations that are drawn
_BEST = 5  # patches whose centroid is a joint's position


def jhmdb_clips(
    root: str | Path,
    *,
    subset: Literal["test", "train"] = "test",
    split: int = 1,
    clips: Sequence[str] | None = None,
) -> list[Clip[Joints]]:
    """List the clips of JHMDB with their joints; frames are read when asked for.

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
        The clips, by class and in the order of its list. Annotations are :class:`Joints` of every
        frame, (x, y) as :mod:`~cosettle_adapter.video.geometry` has them: pixel (0, 0) has its
        centre at (0.5, 0.5). Files count pixels from 1, so 0.5 is subtracted. (The published
        evaluation subtracts 1 and takes a pixel's centre as a whole number.) Visible are joints
        inside the frame; the published measure counts joints outside too.

    Raises:
        FrameError: a folder or list that should be there is not, or a clip that is not listed.
        ValueError: an unknown subset or split.
    """
    if subset not in _SUBSETS or split not in (1, 2, 3):
        raise ValueError(
            f"got subset={subset!r} and split={split}, expected 'test' or 'train' and 1, 2 or 3"
        )
    root = data_folder(root, WHAT)
    if (root / "Rename_Images").is_dir() or (root / "joint_positions").is_dir():
        data_folder(root, WHAT, ["Rename_Images", "joint_positions", "splits"])
        found = {name: (root, kind) for kind, name in _listed(root / "splits", subset, split)}
    else:
        found = {path.name: (path, "") for path in _keypoint_folders(root)}
    wanted = set(pick(clips, found, f"clip {{}} in {root}"))
    listed = []
    for name, (folder, kind) in found.items():
        if name in wanted:
            try:
                listed.append(_mat_clip(folder, kind, name) if kind else _json_clip(folder))
            except FrameError as error:
                listed.append(bad_clip(name, f"JHMDB clip {name!r}: {error}"))
    return listed


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
        counted = pck(truth, guess, thresholds=_THRESHOLDS, visible=found.cpu().numpy())
        counts = {"correct": counted.correct.tolist(), "total": counted.total.tolist()}
        return ClipScores(_named(counted), counts)

    def total(scores: Sequence[ClipScores]) -> dict[str, float]:
        pooled = [
            Pck(_THRESHOLDS, np.array(clip.counts["correct"]), np.array(clip.counts["total"]))
            for clip in scores
        ]
        return _named(functools.reduce(operator.add, pooled))

    return Protocol(
        name="jhmdb",
        measures=tuple(f"PCK@{threshold:g}" for threshold in _THRESHOLDS),
        clips=lambda: jhmdb_clips(data, clips=clips),
        size=lambda _: (320, 320),
        score=score,
        settings=propagation.options(),
        total=total,
    )


def joint_heat_maps(places: Tensor, grid: tuple[int, int], *, sigma: float = _SIGMA) -> Tensor:
    """Draw a Gaussian for every joint.

    Args:
        places: ``(J, 2)`` fractional (row, col) on the grid.
        grid: ``(h, w)``.
        sigma: standard deviation in patches.

    Returns:
        ``(J, h, w)`` float32, 1 where a joint lies on a patch's centre, 0 beyond three standard
        deviations (in whole patches): a joint well outside the frame leaves its map empty.
    """
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in grid)
    row, column = places.float().unbind(-1)
    down = rearrange(rows, "h -> 1 h 1") - rearrange(row, "j -> j 1 1")
    right = rearrange(columns, "w -> 1 1 w") - rearrange(column, "j -> j 1 1")
    near = (down.abs() <= math.ceil(_REACH * sigma)) & (right.abs() <= math.ceil(_REACH * sigma))
    return torch.exp(-(down**2 + right**2) / (2 * sigma**2)) * near


def decode_joints(heat_maps: Tensor, *, best: int = _BEST) -> tuple[Tensor, Tensor]:
    """Read positions out of heat maps: the centroid of the strongest patches, by their weight.

    Args:
        heat_maps: ``(..., J, h, w)``, not negative.
        best: number of patches.

    Returns:
        ``(..., J, 2)`` fractional (row, col), and ``(..., J)`` whether there was anything: a map
        that is empty everywhere gives no position.
    """
    width = heat_maps.shape[-1]
    flat = rearrange(heat_maps, "... h w -> ... (h w)")
    weights, index = flat.topk(min(best, flat.shape[-1]), dim=-1)
    found = weights.sum(-1) > 0
    share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    places = torch.stack([index // width, index % width], dim=-1).to(share)
    return reduce(share[..., None] * places, "... k two -> ... two", "sum"), found


def propagate_joints(
    features: Tensor | Iterable[Tensor], places: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Carry joints of the first frame through a clip.

    Args:
        features: ``(T, C, h, w)``, or an iterable of maps.
        places: ``(J, 2)`` fractional (row, col) in frame 0.
        **options: of :func:`~cosettle_adapter.correspondence.propagate_labels`.

    Returns:
        ``(T, J, 2)`` fractional (row, col) and ``(T, J)`` whether a joint is still to be seen.
    """
    maps = iter(features)
    first = next(maps)
    heat = joint_heat_maps(places, (first.shape[-2], first.shape[-1])).to(first.device)
    return decode_joints(propagate_labels(itertools.chain([first], maps), heat, **options))


def _named(counted: Pck) -> dict[str, float]:
    return {f"PCK@{threshold:g}": share for threshold, share in counted.mean.items()}


def _listed(folder: Path, subset: str, split: int) -> list[tuple[str, str]]:
    """(class, clip) of a subset."""
    ending = f"_test_split{split}.txt"
    lists = [folder / name for name in entries(folder) if name.endswith(ending)]
    if not lists:
        raise FrameError(
            f"no lists in {folder}: expected <class>{ending}, found {found_in(folder)}; unpack "
            "splits.zip there"
        )
    lines = [
        (path.name.removesuffix(ending), line.split())
        for path in lists
        for line in path.read_text().splitlines()
    ]
    return [
        (kind, words[0].removesuffix(".avi"))
        for kind, words in lines
        if len(words) == 2 and words[1] == _SUBSETS[subset]
    ]


def _mat_clip(root: Path, kind: str, name: str) -> Clip[Joints]:
    images = root / "Rename_Images" / kind / name
    frames = images_in(images)
    path = root / "joint_positions" / kind / name / "joint_positions.mat"
    if not frames:
        raise FrameError(f"no frames: {images} holds {found_in(images)}")
    xy = _read_mat(path)
    if len(xy) > len(frames):
        raise FrameError(
            f"joints for {len(xy)} frames, but {images} holds {len(frames)}; unpack Rename_Images "
            "again"
        )
    return _clip(name, frames[: len(xy)], path, xy)


def _json_clip(folder: Path) -> Clip[Joints]:
    frames, path = images_in(folder / "frames"), folder / KEYPOINTS
    content = read_keypoints(path)
    if content.frames != tuple(range(len(frames))) or content.names != JHMDB_JOINTS:
        raise FrameError(
            f"{path} has {len(content.names)} joints of {len(content.frames)} frames, expected "
            f"JHMDB's {len(JHMDB_JOINTS)} of each of the {len(frames)} images in "
            f"{folder / 'frames'}"
        )
    return _clip(folder.name, frames, path, content.xy)


def _clip(
    name: str, frames: tuple[Path, ...], path: Path, counted_from_1: NDArray[np.float64]
) -> Clip[Joints]:
    def read() -> Joints:
        xy = counted_from_1 - 0.5
        height, width = image_size(frames[0])
        inside = np.asarray(((xy >= 0) & (xy <= np.array([width, height]))).all(2))
        return Joints(JHMDB_JOINTS, xy, inside)

    return Clip(name, frames, read, tuple(range(len(frames))), (*frames, path))


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
        raise FrameError(
            f"{path} has pos_img of shape {xy.shape}, expected (2, {len(JHMDB_JOINTS)}, T)"
        )
    return rearrange(xy, "two j t -> t j two")


def _keypoint_folders(root: Path) -> list[Path]:
    if (root / KEYPOINTS).is_file():
        return [root.resolve()]
    folders = [root / name for name in entries(root) if (root / name / KEYPOINTS).is_file()]
    if not folders:
        raise FrameError(
            f"{root} is not {WHAT}, nor are there clips with {KEYPOINTS} in it; found "
            f"{found_in(root)}." + nearby(root, ["Rename_Images", "joint_positions"])
        )
    return folders
