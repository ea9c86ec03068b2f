"""TAP-Vid: videos with tracked points, published as pickles, which are not executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.clips import Clip, bad_clip, entries, found_in, pick
from cosettle_adapter.evaluation.pickles import load_arrays
from cosettle_adapter.evaluation.points import (
    QueryMode,
    queries_first,
    queries_strided,
    tapvid_metrics,
)
from cosettle_adapter.evaluation.protocols import ClipScores, Protocol, save_positions
from cosettle_adapter.evaluation.tracking import track_queries

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cosettle_adapter.video.geometry import Geometry

RASTER = 256  # pixels of a square frame, which the measures' thresholds belong to
WHAT = (
    "a pickle of TAP-Vid (tapvid_davis.pkl, tapvid_rgb_stacking.pkl, 0000_of_0010.pkl of "
    "TAP-Vid-Kinetics) or a folder of such"
)
_KEYS = ("video", "points", "occluded")
_HIDDEN = 2.0  # patches by which a point that is still visible may miss itself on the way back


class Tracks(NamedTuple):
    """Annotated tracks of a video.

    Attributes:
        points: ``(N, T, 2)`` float64 (x, y) as shares of the frame's width and height; where
            occluded, any position.
        occluded: ``(N, T)`` boolean.
    """

    points: NDArray[np.float64]
    occluded: NDArray[np.bool_]


def tapvid_clips(path: str | Path) -> list[Clip[Tracks]]:
    """List the videos of one or more pickles of TAP-Vid, all of them in memory.

    For TAP-Vid-Kinetics, whose ten files are large, iterate over :func:`iter_tapvid_clips`.

    Args:
        path: a pickle, or a folder of them.

    Returns:
        The videos, in the order of the files; frames are decoded one at a time.

    Raises:
        FrameError: no such file, no pickle in the folder, or a single pickle that is refused.
    """
    return list(iter_tapvid_clips(path))


def iter_tapvid_clips(path: str | Path) -> Iterator[Clip[Tracks]]:
    """Yield the videos of pickles of TAP-Vid, with one file in memory at a time.

    A file is a dict of videos by name or a list of videos, each with ``video`` (uint8 frames or
    JPEG files), ``points`` and ``occluded``. It is read without being executed: anything but
    arrays, strings and numbers is refused. Of several files, one that is refused or damaged is one
    clip with a ``problem``, and the others are read.

    Args:
        path: a pickle, or a folder of them.

    Raises:
        FrameError: no such file, no pickle in the folder, or a single pickle that is refused.
    """
    files = _pickles(Path(path).expanduser())
    return (clip for file in files for clip in _read(file, alone=len(files) == 1))


def tapvid_protocol(
    data: Path,
    *,
    clips: Sequence[str] | None = None,
    mode: QueryMode = "first",
    hidden: float = _HIDDEN,
) -> Protocol[Tracks]:
    """Return the benchmark on TAP-Vid: points are tracked to their nearest neighbours.

    Args:
        data: a pickle, or a folder of them.
        clips: names of the videos wanted; by default all.
        mode: how queries are sampled.
        hidden: a point counts as hidden that misses itself on the way back by more patches.
    """

    def listed() -> list[Clip[Tracks]]:
        found = tapvid_clips(data)
        wanted = set(pick(clips, [clip.name for clip in found], f"video {{}} in {data}"))
        return [clip for clip in found if clip.name in wanted]

    def size(clip: Clip[Tracks]) -> tuple[int, int]:
        """Shorter side 480, aspect kept."""
        height, width = clip.read_frame(0).shape[:2]
        return round(480 * height / min(height, width)), round(480 * width / min(height, width))

    def score(
        clip: Clip[Tracks], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Track every query and score it on a 256 x 256 raster."""
        truth = clip.read_annotations()
        sample = queries_first if mode == "first" else queries_strided
        queries = sample(truth.occluded, truth.points * RASTER)
        height, width = geometry.frame
        to_frame = torch.tensor([width, height], dtype=torch.float64) / RASTER
        points = torch.from_numpy(queries.points)
        found = track_queries(features, points[:, 0], points[:, 1:].flip(-1) * to_frame, geometry)
        save_positions(found.xy.numpy(), predictions)
        scores = tapvid_metrics(
            queries.points,
            queries.occluded,
            queries.tracks,
            (found.cycle_error > hidden).numpy(),
            (found.xy / to_frame).numpy(),
            mode=mode,
        )
        figures = (scores.delta_avg, scores.occlusion_accuracy, scores.average_jaccard)
        return ClipScores(dict(zip(measures, figures, strict=True)))

    measures = ("delta_avg", "OA", "AJ")
    settings = {"tracking": "nearest neighbour", "mode": mode, "hidden_cells": hidden}
    return Protocol("tapvid", measures, listed, size, score, settings)


def _pickles(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        near = did_you_mean(path.name, entries(path.parent))
        raise FrameError(f"{path} does not exist, expected {WHAT}.{near}")
    found = [path / name for name in entries(path) if name.endswith(".pkl")]
    if not found:
        raise FrameError(f"{path} holds no .pkl, expected {WHAT}; found {found_in(path)}")
    return found


def _read(path: Path, *, alone: bool) -> list[Clip[Tracks]]:
    try:
        content = load_arrays(path)
        if isinstance(content, Mapping):
            named = {str(name): entry for name, entry in content.items()}
        elif isinstance(content, (list, tuple)):
            named = {f"{path.stem}_{index:04d}": entry for index, entry in enumerate(content)}
        else:
            raise FrameError(f"{path} holds a {type(content).__name__}, expected {WHAT}")
        if named.keys() >= set(_KEYS):
            raise FrameError(f"{path} holds one video's entries, expected a dict or list of videos")
    except FrameError as error:
        if alone:
            raise
        return [bad_clip(path.stem, str(error))]
    return [_clip(path, name, entry) for name, entry in named.items()]


def _clip(path: Path, name: str, entry: Any) -> Clip[Tracks]:
    where = f"TAP-Vid video {name!r} of {path}"
    if not isinstance(entry, Mapping) or not set(_KEYS) <= set(entry):
        held = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        return bad_clip(name, f"{where} has {held}, expected {', '.join(_KEYS)}")
    frames = _frames(entry["video"])
    if not frames:
        return bad_clip(name, f"{where} has no frames: expected uint8 (T, H, W, 3) or T JPEG files")
    points, occluded = np.asarray(entry["points"]), np.asarray(entry["occluded"])
    if (
        points.dtype.kind not in "fiu"
        or points.ndim != 3
        or points.shape[1:] != (len(frames), 2)
        or occluded.shape != points.shape[:2]
        or not np.isin(occluded, (0, 1)).all()
    ):
        return bad_clip(
            name,
            f"{where} has points of shape {points.shape} and occlusion of shape {occluded.shape}, "
            f"expected (N, {len(frames)}, 2) and (N, {len(frames)}) for its {len(frames)} frames",
        )
    tracks = Tracks(points.astype(np.float64), occluded.astype(bool))
    return Clip(name, frames, lambda: tracks, inputs=(*frames, *tracks))


def _frames(video: Any) -> list[Any]:
    """Frames as arrays or as JPEG files; none if the video is neither."""
    if isinstance(video, np.ndarray) and video.dtype != np.uint8:
        video = video.tolist() if video.dtype.kind == "S" else None
    elif isinstance(video, np.ndarray):
        video = list(video) if video.ndim == 4 and video.shape[3] == 3 else None
    elif not isinstance(video, (list, tuple)) or not all(isinstance(f, bytes) for f in video):
        video = None
    return list(video or ())
