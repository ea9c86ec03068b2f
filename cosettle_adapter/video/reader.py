"""Read frames of any source as chunks of uint8 pixels with timestamps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video import decoder, files
from cosettle_adapter.video.arrays import as_frames, holds_pixels
from cosettle_adapter.video.decoder import SourceInfo
from cosettle_adapter.video.selection import FrameSelection, PendingFrame, selects_frames


@dataclass(frozen=True, eq=False)
class FrameChunk:
    """Consecutive frames of a source."""

    frames: Tensor  # (N, 3, H, W) uint8
    timestamps: Tensor  # (N,) float64 seconds
    start: int  # number of frames delivered before this chunk


@selects_frames
def open_frames(
    source: Any, select: FrameSelection | None = None, *, skip: int = 0, chunk_size: int = 8
) -> Generator[FrameChunk, None, None]:
    """Read frames chunk by chunk, with one chunk in memory at a time.

    Args:
        source: a video file; a folder of images or a glob pattern, read in natural order
            (``frame2`` before ``frame10``); a list of image files; frames in memory as
            :func:`as_frames` takes them; or an iterator of single frames, which is not closed.
            Float frames in [0, 1] are rounded to uint8.
        select: the frames to read; all by default.
        skip: number of selected frames to skip at the start, without converting their pixels.
        chunk_size: frames per chunk; the last chunk may hold fewer.

    Raises:
        FrameError: at once for unusable arguments and sources; while reading, after the frames
            before it, for a damaged file, a frame of another size, or a range without frames.
        TruncatedVideoError: after the last readable frame of a video that is damaged or ends
            before its announced duration.
    """
    select = select or FrameSelection()
    if skip < 0:
        raise FrameError(f"skip must be at least 0, got {skip}")
    if chunk_size < 1:
        raise FrameError(f"chunk_size must be at least 1, got {chunk_size}")
    is_path = isinstance(source, (str, os.PathLike))
    name = str(source) if is_path else f"the {type(source).__name__} of frames"
    selected = select.of(pending_frames(source, select.start, select.fps), name, skip=skip)
    return _chunks(selected, chunk_size, name, skip)


def pending_frames(
    source: Any, start: float | None = None, fps: float | None = None
) -> Generator[PendingFrame, None, None]:
    """Yield all frames of a source; frames of a video before ``start`` may be left out."""
    content = _open(source)
    if not isinstance(content, Path):
        return (
            PendingFrame(
                index / (fps or 1.0),
                str(item) if isinstance(item, (str, os.PathLike)) else f"frame {index}",
                partial(_load, item, index),
            )
            for index, item in enumerate(content)
        )
    if fps is not None:
        raise FrameError(f"{source} is a video and has times of its own; leave out fps")
    with decoder.open_video(content):
        pass  # raises at once if it is not a video
    return decoder.decode_video(content, start)


def pinned(chunks: Generator[FrameChunk, None, None]) -> Generator[FrameChunk, None, None]:
    """Move frames to page-locked memory, which a GPU can copy from while it computes."""
    with contextlib.closing(chunks):
        for chunk in chunks:
            yield replace(chunk, frames=chunk.frames.pin_memory())


def probe(source: Any) -> SourceInfo:
    """Return the number and size of the frames of any source that :func:`open_frames` takes.

    At most one frame is read, and an iterator is not advanced.
    """
    content = _open(source)
    if isinstance(content, Path):
        with decoder.open_video(content, threads=False) as video:
            fps = float(1 / video.step) if video.step else None
            estimate = round((video.seconds or 0) * (fps or 0)) or None
            with contextlib.closing(video.timed_frames(from_start=True)) as frames:
                height, width = video.pixels(next(frames)[0]).shape[-2:]
            return SourceInfo(video.stream.frames or estimate, height, width, fps)
    if isinstance(content, (Tensor, list, tuple)):
        return SourceInfo(len(content), *_load(content[0], 0).shape[-2:])
    return SourceInfo(len(content) if isinstance(content, Sized) else None)


def _open(source: Any) -> Path | Tensor | Iterable[Any]:
    """Resolve a source to a video file, a clip (T, 3, H, W), or single frames and image files."""
    if isinstance(source, (str, os.PathLike)):
        return files.resolve(source)
    if holds_pixels(source):
        frames = as_frames(source)
        if frames.ndim == 5:
            raise FrameError(
                f"got a batch of clips, shape {tuple(frames.shape)}; "
                "a source is one clip (T, 3, H, W): open them one by one"
            )
        return frames if frames.ndim == 4 else rearrange(frames, "c h w -> 1 c h w")
    if not isinstance(source, Iterable) or isinstance(source, (bytes, bytearray, Mapping)):
        raise FrameError(
            f"cannot read frames from an object of type {type(source).__name__}; expected a video "
            "file, an image folder, a pattern, a tensor (T, 3, H, W), an array (T, H, W, 3), or a "
            "list or iterator of single frames"
        )
    if isinstance(source, (list, tuple)) and not source:
        raise FrameError("got zero frames: an empty list")
    return source


def _load(item: Any, index: int) -> Tensor:
    if isinstance(item, (str, os.PathLike)):
        return files.read_image(Path(item))
    frame = as_frames(item)
    if frame.ndim != 3:
        raise FrameError(
            f"frame {index} has shape {tuple(frame.shape)}, expected one image, (3, H, W) or "
            "(H, W, 3)"
        )
    return frame


def _chunks(
    selected: Generator[PendingFrame, None, None], chunk_size: int, source: str, delivered: int
) -> Generator[FrameChunk, None, None]:
    shape: tuple[int, ...] = ()
    failure: Exception | None = None
    with contextlib.closing(selected):
        while failure is None:
            times: list[float] = []
            frames: Tensor | None = None
            try:
                while len(times) < chunk_size and (pending := next(selected, None)) is not None:
                    pixels = pending.load()
                    if pixels.dtype != torch.uint8:
                        pixels = (pixels.detach().float() * 255).round_().clamp_(0, 255)
                    shape = shape or tuple(pixels.shape)
                    if tuple(pixels.shape) != shape:
                        raise FrameError(
                            f"{pending.name} of {source} is {pixels.shape[-2]} x "
                            f"{pixels.shape[-1]}, but the first frame is {shape[-2]} x "
                            f"{shape[-1]}; resize the frames to one size"
                        )
                    if frames is None:
                        frames = pixels.new_empty((chunk_size, *shape), dtype=torch.uint8)
                    frames[len(times)] = pixels
                    times.append(pending.time)
            except Exception as error:
                failure = error
            if frames is None:
                break
            seconds = torch.tensor(times, dtype=torch.float64)
            yield FrameChunk(frames[: len(times)], seconds, delivered)
            delivered += len(times)
    if isinstance(failure, TruncatedVideoError):
        failure.frames_read = delivered
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # breaks the cycle of an error and its traceback
