"""TAP-Vid: videos with tracked points, published as pickles, which are not executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.clips import Clip, entries, found_in, list_clips
from cosettle_adapter.evaluation.pickles import load_arrays
from cosettle_adapter.evaluation.points import (
    QueryMode,
    queries_first,
    queries_strided,
    tapvid_metrics,
    track_queries,
)
from cosettle_adapter.evaluation.protocols import ClipScores, Protocol, save_positions
from cosettle_adapter.video.geometry import Geometry

WHAT = "a pickle of TAP-Vid (tapvid_davis.pkl, 0000_of_0010.pkl, ...) or a folder of such"
_RASTER = 256  # pixels of a square frame, which the measures' thresholds belong to
_KEYS = ("video", "points", "occluded")
_HIDDEN = 2.0  # patches by which a point that is still visible may miss itself on the way back


class Tracks(NamedTuple):
    """Annotated tracks of a video."""

    points: NDArray[np.float64]  # (N, T, 2) (x, y) as shares of the frame's width and height
    occluded: NDArray[np.bool_]  # (N, T); where true, the point may be anywhere


def tapvid_clips(path: str | Path, *, clips: Sequence[str] | None = None) -> list[Clip[Tracks]]:
    """List the videos of a pickle of TAP-Vid, or of all in a folder; all of them in memory.

    A file is a dict of videos by name or a list of videos, each with ``video`` (uint8 frames or
    JPEG files), ``points`` and ``occluded``. It is read without being executed: anything but
    arrays, strings and numbers is refused.

    Raises:
        FrameError: no such file, no pickle in the folder, or one that is refused or damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        near = did_you_mean(path.name, entries(path.parent))
        raise FrameError(f"{path} does not exist, expected {WHAT}.{near}")
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.pkl"))
    if not files:
        raise FrameError(f"{path} holds no .pkl, expected {WHAT}; found {found_in(path)}")
    found = {name: entry for file in files for name, entry in _videos(file).items()}
    return list_clips("TAP-Vid video", path, found, clips, lambda name: _clip(name, found[name]))


def tapvid_protocol(
    data: Path, *, clips: Sequence[str] | None = None, mode: QueryMode = "first"
) -> Protocol[Tracks]:
    """Return the benchmark on TAP-Vid: points are tracked to their nearest neighbours.

    A point counts as hidden that misses itself on the way back by more than two patches.
    """

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
        queries = sample(truth.occluded, truth.points * _RASTER)
        height, width = geometry.frame
        to_frame = torch.tensor([width, height], dtype=torch.float64) / _RASTER
        points = torch.from_numpy(queries.points)
        xy, error = track_queries(
            features, points[:, 0], points[:, 1:].flip(-1) * to_frame, geometry
        )
        save_positions(xy.numpy(), predictions)
        guess, hidden = (xy / to_frame).numpy(), (error > _HIDDEN).numpy()
        found = tapvid_metrics(*queries[:3], hidden, guess, mode)
        return ClipScores(dict(zip(measures, found[:3], strict=True)))

    measures = ("delta_avg", "OA", "AJ")
    settings = {"tracking": "nearest neighbour", "mode": mode, "hidden_cells": _HIDDEN}
    return Protocol(
        "tapvid", measures, lambda: tapvid_clips(data, clips=clips), size, score, settings
    )


def _videos(path: Path) -> dict[str, Any]:
    content = load_arrays(path)
    if isinstance(content, (list, tuple)):
        return {f"{path.stem}_{index:04d}": entry for index, entry in enumerate(content)}
    if not isinstance(content, Mapping):
        raise FrameError(f"{path} holds a {type(content).__name__}, expected {WHAT}")
    if content.keys() >= set(_KEYS):
        raise FrameError(f"{path} holds one video's entries, expected a dict or list of videos")
    return {str(name): entry for name, entry in content.items()}


def _clip(name: str, entry: Any) -> Clip[Tracks]:
    if not isinstance(entry, Mapping) or not set(_KEYS) <= set(entry):
        held = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise FrameError(f"got {held}, expected {', '.join(_KEYS)}")
    frames = _frames(entry["video"])
    if not frames:
        raise FrameError("no frames; expected uint8 (T, H, W, 3) or T JPEG files")
    points, occluded = np.asarray(entry["points"]), np.asarray(entry["occluded"])
    if (
        points.dtype.kind not in "fiu"
        or points.shape[1:] != (len(frames), 2)
        or occluded.shape != points.shape[:2]
        or not np.isin(occluded, (0, 1)).all()
    ):
        raise FrameError(
            f"points of shape {points.shape} and occlusion of shape {occluded.shape}, expected "
            f"numbers (N, {len(frames)}, 2) and booleans (N, {len(frames)})"
        )
    tracks = Tracks(points.astype(np.float64), occluded.astype(bool))
    return Clip(name, frames, lambda: tracks, inputs=(*frames, *tracks))


def _frames(video: Any) -> list[Any]:
    """Frames as arrays or as JPEG files; none if the video is neither."""
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        return list(video) if video.ndim == 4 and video.shape[3] == 3 else []
    found = video.tolist() if isinstance(video, np.ndarray) else video
    jpegs = isinstance(found, (list, tuple)) and all(isinstance(f, bytes) for f in found)
    return list(found) if jpegs else []
