"""Reading TAP-Vid: videos with tracked points, published as pickles, which are not executed."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.datasets.layout import entries, found_in
from cosettle_adapter.evaluation.datasets.pickles import load_arrays
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RASTER = (256, 256)  # what TAP-Vid's thresholds in pixels belong to
WHAT = (
    "a pickle of TAP-Vid (tapvid_davis.pkl, tapvid_rgb_stacking.pkl, 0000_of_0010.pkl of "
    "TAP-Vid-Kinetics) or a folder of such"
)
_KEYS = ("video", "points", "occluded")


@dataclasses.dataclass(frozen=True, eq=False)
class TapVidClip:
    """One video of TAP-Vid; its pickle is in memory, JPEG frames are decoded one at a time.

    Attributes:
        name: the video's key, or the file's name and the place in it.
        video: ``(T, H, W, 3)`` uint8, or T JPEG files.
        points: ``(N, T, 2)`` (x, y) as shares of the frame's width and height; where occluded,
            any position.
        occluded: ``(N, T)`` boolean.
        problem: why it cannot be used, or None; then reading raises it.
    """

    name: str
    video: NDArray[np.uint8] | Sequence[bytes]
    points: NDArray[np.float64]
    occluded: NDArray[np.bool_]
    problem: str | None = dataclasses.field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.video)

    def check(self) -> None:
        """Raise what was found to be wrong while listing.

        Raises:
            FrameError: the clip cannot be used.
        """
        if self.problem is not None:
            raise FrameError(self.problem)

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB, at the size it was stored in.

        Raises:
            FrameError: the clip has a problem, or a frame is damaged.
        """
        self.check()
        np: Any = require("numpy", extra="eval", purpose="reading TAP-Vid")
        stored = self.video[index]
        if not isinstance(stored, bytes):
            return np.array(stored)  # type: ignore[no-any-return]
        pillow: Any = require("PIL.Image", extra="eval", purpose="reading TAP-Vid")
        try:
            with pillow.open(io.BytesIO(stored)) as opened:
                frame: NDArray[np.uint8] = np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
            raise FrameError(
                f"frame {index} of TAP-Vid video {self.name!r} cannot be read: {error}"
            ) from error
        return frame

    def read_tracks(self, size: tuple[int, int] = RASTER) -> NDArray[np.float64]:
        """Return the annotated tracks: ``(N, T, 2)`` (x, y) pixels of frames of a size.

        Args:
            size: (height, width); TAP-Vid's measures want (256, 256).

        Raises:
            FrameError: the clip has a problem.
        """
        self.check()
        np: Any = require("numpy", extra="eval", purpose="reading TAP-Vid")
        tracks: NDArray[np.float64] = self.points * np.array([size[1], size[0]], dtype=np.float64)
        return tracks


def tapvid_clips(path: str | Path) -> list[TapVidClip]:
    """List the videos of one or more pickles of TAP-Vid, all of them in memory.

    For TAP-Vid-Kinetics, whose ten files are large, iterate over :func:`iter_tapvid_clips`.

    Args:
        path: a pickle, or a folder of them.

    Returns:
        The videos, in the order of the files. One that cannot be used has a ``problem`` and
        raises it when read.

    Raises:
        FrameError: no such file, no pickle in the folder, or a single pickle that is refused.
    """
    return list(iter_tapvid_clips(path))


def iter_tapvid_clips(path: str | Path) -> Iterator[TapVidClip]:
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


def _read(path: Path, *, alone: bool) -> list[TapVidClip]:
    try:
        content = load_arrays(path)
        if isinstance(content, Mapping):
            named = [(str(name), entry) for name, entry in content.items()]
        elif isinstance(content, (list, tuple)):
            named = [(f"{path.stem}_{index:04d}", entry) for index, entry in enumerate(content)]
        else:
            raise FrameError(f"{path} holds a {type(content).__name__}, expected {WHAT}")
        if set(_KEYS) <= {name for name, _ in named}:
            raise FrameError(f"{path} holds one video's entries, expected a dict or list of videos")
    except FrameError as error:
        if alone:
            raise
        return [_bad(path.stem, str(error))]
    return [_clip(path, name, entry) for name, entry in named]


def _clip(path: Path, name: str, entry: Any) -> TapVidClip:
    np: Any = require("numpy", extra="eval", purpose="reading TAP-Vid")
    where = f"TAP-Vid video {name!r} of {path}"
    if not isinstance(entry, Mapping) or not set(_KEYS) <= set(entry):
        held = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        return _bad(name, f"{where} has {held}, expected {', '.join(_KEYS)}")
    video = entry["video"]
    points, occluded = np.asarray(entry["points"]), np.asarray(entry["occluded"])
    encoded = isinstance(video, (list, tuple)) or (
        isinstance(video, np.ndarray) and video.dtype.kind == "S"
    )
    if encoded:
        video = [bytes(frame) for frame in video] if _all_bytes(video) else None
    elif not (
        isinstance(video, np.ndarray)
        and video.dtype == np.uint8
        and video.ndim == 4
        and video.shape[3] == 3
    ):
        video = None
    if video is None or not len(video):
        return _bad(name, f"{where} has no frames: expected uint8 (T, H, W, 3) or T JPEG files")
    if (
        points.dtype.kind not in "fiu"
        or points.ndim != 3
        or points.shape[1:] != (len(video), 2)
        or occluded.shape != points.shape[:2]
        or not np.isin(occluded, (0, 1)).all()
    ):
        return _bad(
            name,
            f"{where} has points of shape {points.shape} and occlusion of shape {occluded.shape}, "
            f"expected (N, {len(video)}, 2) and (N, {len(video)}) for its {len(video)} frames",
        )
    return TapVidClip(name, video, points.astype(np.float64), occluded.astype(bool))


def _all_bytes(frames: Sequence[Any]) -> bool:
    return all(isinstance(frame, bytes) for frame in frames)


def _bad(name: str, problem: str) -> TapVidClip:
    np: Any = require("numpy", extra="eval", purpose="reading TAP-Vid")
    nothing = np.zeros((0, 0, 2))
    return TapVidClip(name, (), nothing, nothing[..., 0] > 0, problem=problem)
