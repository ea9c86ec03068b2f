"""Anything that holds frames, as chunks of uint8 pixels with timestamps."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.extras import require
from cosettle_adapter.frames.arrays import as_frames, is_array, is_image
from cosettle_adapter.frames.video import decode_video, video_info

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

TimedFrame = tuple[Tensor, float]


@dataclasses.dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of a source.

    Attributes:
        frames: ``(N, 3, H, W)`` uint8.
        timestamps: ``(N,)`` float64, seconds.
        start: number of frames delivered before this chunk.
    """

    frames: Tensor
    timestamps: Tensor
    start: int


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What can be told about a source without decoding it.

    Attributes:
        frames: number of frames, or ``None`` if unknown.
        height: height in pixels, or ``None``.
        width: width in pixels, or ``None``.
        fps: frames per second, or ``None``.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None


def open_frames(
    source: Any,
    *,
    start: float | None = None,
    end: float | None = None,
    every: int = 1,
    max_frames: int | None = None,
    chunk_size: int = 8,
    fps: float | None = None,
) -> Iterator[FrameChunk]:
    """Read frames chunk by chunk, keeping no more than one chunk.

    Args:
        source: a video file, a folder of images (in natural order: 2 before 10), a glob pattern,
            frames in memory (see :func:`~cosettle_adapter.frames.arrays.as_frames`), or an
            iterator of single frames.
        start: first second to read.
        end: second to stop before.
        every: keep every n-th frame of those in range.
        max_frames: keep at most this many frames.
        chunk_size: frames a chunk.
        fps: frames per second of sources without timestamps; 1 by default, which makes the
            timestamps of images their index.

    Returns:
        An iterator of :class:`FrameChunk`.

    Raises:
        FrameError: a bad argument or a missing, empty or unreadable source (at once); frames of
            differing sizes, or no frame in the range (while iterating).
        TruncatedVideoError: a video breaks off, after the chunks that could be read.
    """
    for name, value, least in (
        ("every", every, 1),
        ("max_frames", max_frames, 1),
        ("chunk_size", chunk_size, 1),
        ("start", start, 0),
    ):
        if value is not None and value < least:
            raise FrameError(f"{name} must be at least {least}, got {value}")
    if end is not None and end <= (start or 0):
        raise FrameError(f"end must be after start, got start {start or 0} and end {end}")
    if fps is not None and not fps > 0:
        raise FrameError(f"fps must be positive, got {fps}")
    timed = _timed_frames(source, start=start, end=end, fps=fps)
    kept = itertools.islice(timed, 0, None, every)
    return _chunks(itertools.islice(kept, max_frames), timed, chunk_size, source=source)


def probe(source: Any) -> SourceInfo:
    """Tell a source's number and size of frames, as far as that costs nothing.

    Raises:
        FrameError: a missing or unreadable file.
    """
    if isinstance(source, str | os.PathLike):
        files = _files(source)
        if isinstance(files, list):
            height, width = _read_image(files[0]).shape[-2:]
            return SourceInfo(len(files), height, width)
        info = video_info(files)
        return SourceInfo(info.frames, info.height, info.width, info.fps)
    if isinstance(source, Tensor | list | tuple) or is_array(source) or is_image(source):
        frames = _stacked(source)
        return SourceInfo(len(frames), frames.shape[-2], frames.shape[-1])
    return SourceInfo()


def _chunks(
    kept: Iterator[TimedFrame], timed: Iterator[TimedFrame], chunk_size: int, *, source: Any
) -> Iterator[FrameChunk]:
    delivered = 0
    frames: list[Tensor] = []
    times: list[float] = []
    broken: TruncatedVideoError | None = None
    size: tuple[int, ...] | None = None

    def chunk() -> FrameChunk:
        return FrameChunk(torch.stack(frames), torch.tensor(times, dtype=torch.float64), delivered)

    try:
        while True:
            try:
                frame, time = next(kept)
            except StopIteration:
                break
            except TruncatedVideoError as error:
                broken = error
                break
            size = size or tuple(frame.shape)
            if tuple(frame.shape) != size:
                raise FrameError(
                    f"frame {delivered + len(frames)} of {_describe(source)} is "
                    f"{frame.shape[-2]} x {frame.shape[-1]}, those before it are "
                    f"{size[-2]} x {size[-1]}; all frames of a source have one size"
                )
            frames.append(frame)
            times.append(time)
            if len(frames) == chunk_size:
                yield chunk()
                delivered += len(frames)
                frames, times = [], []
        if frames:
            yield chunk()
            delivered += len(frames)
        if broken is not None:
            raise broken
        if not delivered:
            raise FrameError(f"{_describe(source)} has no frames in the range asked for")
    finally:
        close = getattr(timed, "close", None)
        if close is not None:
            close()


def _timed_frames(
    source: Any, *, start: float | None, end: float | None, fps: float | None
) -> Iterator[TimedFrame]:
    rate = 1.0 if fps is None else fps
    if isinstance(source, str | os.PathLike):
        files = _files(source)
        if not isinstance(files, list):
            return decode_video(files, start=start, end=end)
        first = 0 if start is None else -int(-start * rate // 1)
        stop = len(files) if end is None else min(len(files), -int(-end * rate // 1))
        return ((_read_image(files[i]), i / rate) for i in range(first, stop))
    singles: Iterable[Any]
    if isinstance(source, Tensor | list | tuple) or is_array(source) or is_image(source):
        singles = _stacked(source)
    elif isinstance(source, Iterable):
        singles = (_single(item, index) for index, item in enumerate(source))
    else:
        raise FrameError(
            f"cannot read frames from {type(source).__name__}; expected a path, a glob pattern, "
            "frames in memory, or an iterator of frames"
        )
    return _in_range(singles, rate, start=start, end=end)


def _in_range(
    singles: Iterable[Tensor], rate: float, *, start: float | None, end: float | None
) -> Iterator[TimedFrame]:
    for index, frame in enumerate(singles):
        time = index / rate
        if end is not None and time >= end:
            return
        if start is None or time >= start:
            yield _to_bytes(frame), time


def _single(item: Any, index: int) -> Tensor:
    frame = as_frames(item)
    if frame.ndim != 3:
        raise FrameError(
            f"item {index} of the iterator has shape {tuple(frame.shape)}, expected one frame "
            "(3, H, W) or (H, W, 3)"
        )
    return frame


def _stacked(source: Any) -> Tensor:
    frames = as_frames(source)
    if frames.ndim == 5:
        raise FrameError(
            f"got {tuple(frames.shape)}: a stream is one video, so pass one item of the batch"
        )
    return frames if frames.ndim == 4 else rearrange(frames, "c h w -> 1 c h w")


def _to_bytes(frame: Tensor) -> Tensor:
    if frame.is_floating_point():
        return (frame.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return frame


def _files(source: str | os.PathLike[str]) -> Path | list[Path]:
    """A video file, or the images of a folder or pattern in natural order."""
    path = Path(source).expanduser()
    if path.is_dir():
        images = _images(path.iterdir())
        if not images:
            raise FrameError(
                f"the folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}); "
                "a video is given by its own path"
            )
        return images
    if path.is_file():
        return [path] if path.suffix.lower() in IMAGE_SUFFIXES else path
    if glob.has_magic(str(source)):
        images = _images(Path(match) for match in glob.iglob(str(path)))  # noqa: PTH207 - absolute patterns
        if not images:
            raise FrameError(f"no images match the pattern {source}")
        return images
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=3)
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    raise FrameError(f"{source} does not exist.{hint}")


def _images(paths: Iterable[Path]) -> list[Path]:
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(images, key=_natural)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", path.name)
    ]


def _read_image(path: Path) -> Tensor:
    image = require("PIL.Image", extra="video", purpose="reading image files")
    try:
        with image.open(path) as opened:
            return as_frames(opened)
    except (OSError, SyntaxError) as error:
        raise FrameError(f"{path} cannot be read as an image: {error}") from error


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
