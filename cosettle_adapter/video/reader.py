"""Whatever holds frames, as chunks of uint8 pixels with timestamps."""

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
    """Read frames chunk by chunk; one chunk at a time is in memory.

    Args:
        source: a video file; a folder of images or a glob pattern, read in natural order
            (``frame2`` before ``frame10``); a list of image files; frames in memory as
            :func:`as_frames` takes them; or an iterator of single frames, which is not closed.
            Float frames in [0, 1] are rounded to uint8.
        select: which frames; all by default.
        skip: pass over the first ones of those kept, without making their pixels.
        chunk_size: frames in a chunk; the last one may hold fewer.

    Raises:
        FrameError: at once for arguments and sources that cannot be used; while reading, after the
            frames before it, for a damaged file, another size, and a range without frames.
        TruncatedVideoError: after the last readable frame of a video that breaks off or ends
            before the length its header promises.
    """
    select = select or FrameSelection()
    if skip < 0:
        raise FrameError(f"skip must be at least 0, got {skip}")
    if chunk_size < 1:
        raise FrameError(f"chunk_size must be at least 1, got {chunk_size}")
    is_path = isinstance(source, (str, os.PathLike))
    name = str(source) if is_path else f"the {type(source).__name__} of frames"
    wanted = select.of(pending_frames(source, select.start, select.fps), name, skip=skip)
    return _chunks(wanted, chunk_size, name, skip)


def pending_frames(
    source: Any, start: float | None = None, fps: float | None = None
) -> Generator[PendingFrame, None, None]:
    """Yield all frames of a source; those of a video before ``start`` may be left out."""
    found = _find(source)
    if not isinstance(found, Path):
        return (
            PendingFrame(
                index / (fps or 1.0),
                str(item) if isinstance(item, (str, os.PathLike)) else f"frame {index}",
                partial(_load, item, index),
            )
            for index, item in enumerate(found)
        )
    if fps is not None:
        raise FrameError(f"{source} is a video and has times of its own; leave out fps")
    with decoder.open_video(found):
        pass  # what is no video is refused at once
    return decoder.decode_video(found, start)


def pinned(chunks: Generator[FrameChunk, None, None]) -> Generator[FrameChunk, None, None]:
    """Move frames into page-locked memory, from which a GPU copies while it computes."""
    with contextlib.closing(chunks):
        for chunk in chunks:
            yield replace(chunk, frames=chunk.frames.pin_memory())


def probe(source: Any) -> SourceInfo:
    """Tell the number and size of the frames of what :func:`open_frames` takes.

    They are not all read, and an iterator is not advanced.
    """
    found = _find(source)
    if isinstance(found, Path):
        with decoder.open_video(found, threads=False) as video:
            fps = float(1 / video.step) if video.step else None
            promised = round((video.seconds or 0) * (fps or 0)) or None
            with contextlib.closing(video.timed_frames(from_start=True)) as frames:
                height, width = video.pixels(next(frames)[0]).shape[-2:]
            return SourceInfo(video.stream.frames or promised, height, width, fps)
    if isinstance(found, (Tensor, list, tuple)):
        return SourceInfo(len(found), *_load(found[0], 0).shape[-2:])
    return SourceInfo(len(found) if isinstance(found, Sized) else None)


def _find(source: Any) -> Path | Tensor | Iterable[Any]:
    """Tell what a source is: a video, a clip (T, 3, H, W), or frames and image files one by one."""
    if isinstance(source, (str, os.PathLike)):
        return files.resolve(source)
    if holds_pixels(source):
        frames = as_frames(source)
        if frames.ndim == 5:
            raise FrameError(
                f"got a batch of clips, shape {tuple(frames.shape)}; "
                "a source is one clip (T, 3, H, W), so open them one by one"
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
    wanted: Generator[PendingFrame, None, None], chunk_size: int, source: str, delivered: int
) -> Generator[FrameChunk, None, None]:
    first: tuple[int, ...] | None = None
    failure: Exception | None = None
    with contextlib.closing(wanted):
        while failure is None:
            times: list[float] = []
            frames: Tensor | None = None
            try:
                while len(times) < chunk_size and (pending := next(wanted, None)) is not None:
                    pixels = pending.load()
                    if pixels.dtype != torch.uint8:
                        pixels = (pixels.detach().float() * 255).round_().clamp_(0, 255)
                    first = first or tuple(pixels.shape)
                    if tuple(pixels.shape) != first:
                        here, there = (f"{size[-2]} x {size[-1]}" for size in (pixels.shape, first))
                        raise FrameError(
                            f"{pending.name} of {source} is {here}, but the first "
                            f"frame is {there}; resize the frames to one size"
                        )
                    if frames is None:
                        frames = pixels.new_empty((chunk_size, *first), dtype=torch.uint8)
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
        del failure  # it and its traceback would keep each other alive
