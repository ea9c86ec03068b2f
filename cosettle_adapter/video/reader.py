"""Read frames of any source as chunks of uint8 pixels with timestamps."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import DamagedError, FrameError
from cosettle_adapter.video import decoder, files
from cosettle_adapter.video.arrays import as_frames, holds_pixels
from cosettle_adapter.video.decoder import SourceInfo
from cosettle_adapter.video.selection import (
    FrameSelection,
    LostFrames,
    PendingFrame,
    selects_frames,
)
from cosettle_adapter.video.sources import Input, as_input

logger = logging.getLogger(__name__)

_NAMED = 8  # times that a message lists


@dataclass(frozen=True, eq=False)
class FrameChunk:
    """Consecutive frames of a source."""

    frames: Tensor  # (N, 3, H, W) uint8
    timestamps: Tensor  # (N,) float64 seconds since the first frame of the source
    start: int  # number of frames delivered before this chunk
    lost: tuple[float, ...] = ()  # seconds of frames lost to damage, in or next to this chunk


@selects_frames
def open_frames(
    source: Any,
    select: FrameSelection | None = None,
    *,
    skip: int = 0,
    chunk_size: int = 8,
    one_size: bool = True,
) -> Generator[FrameChunk, None, None]:
    """Read frames chunk by chunk, with one chunk in memory at a time.

    Damage loses only the frames it affects: a warning and ``chunk.lost`` list them, or an error if
    ``select.on_damage`` is ``"error"``.

    Args:
        source: a video file or its URL (``https://``, ``s3://``, ...); ``-`` for standard input;
            an open binary file; a live input: a stream's URL (``rtsp://``, ``udp://``, ...) or a
            camera's number; a folder of images or a glob pattern, read in natural order
            (``frame2`` before ``frame10``); a list of image files; frames in memory as
            :func:`as_frames` takes them; or an iterator of single frames. Open files and iterators
            are not closed. Float frames in [0, 1] are rounded to uint8.
        select: the frames to read; all by default.
        skip: number of selected frames to skip at the start, without converting their pixels.
        chunk_size: frames per chunk; the last chunk may hold fewer.
        one_size: refuse frames of another size; otherwise they begin a new chunk.

    Raises:
        FrameError: at once for unusable arguments and sources; while reading, after the frames
            before it, for a frame of another size, a range without frames, or nothing but damage.
        DamagedError: for frames lost to damage, after those before them, if so selected.
        ConnectionError: after the frames received, if the connection to a URL cannot be resumed.
    """
    select = select or FrameSelection()
    for count, least, name in ((skip, 0, "skip"), (chunk_size, 1, "batch_size (chunk_size)")):
        if count < least or count % 1:
            raise FrameError(f"{name} must be a whole number of at least {least}, got {count}")
    content = _open(source, select.live)
    name = name_of(source, content)
    selected = select.of(_pending(content, select, name), name, skip=skip)
    stored = isinstance(content, (Path, list)) or (isinstance(content, Input) and not content.live)
    return _Chunks(name, chunk_size, skip, select, one_size, eager=not stored).of(selected)


def pending_frames(
    source: Any, select: FrameSelection | None = None
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield all frames of a source; frames of a video before ``select.start`` may be left out."""
    select = select or FrameSelection()
    content = _open(source, select.live)
    return _pending(content, select, name_of(source, content))


def _pending(
    content: Path | Input | Tensor | Iterable[Any], select: FrameSelection, name: str
) -> Generator[PendingFrame | LostFrames, None, None]:
    if isinstance(content, Input) and content.live:
        from cosettle_adapter.video.live import read_live  # rarely used

        return read_live(content, select)
    if isinstance(content, (Path, Input)):
        return decoder.decode_video(content, select, announce=True)
    if (single := _single_image(content)) and files.count_pages(single) > 1:
        return files.read_pages(single)
    if select.source_fps is None and (select.fps is not None or select.times is not None):
        raise FrameError(
            f"fps and times need the times of frames, which {name} does not have; give its frame "
            "rate as source_fps"
        )
    return (
        PendingFrame(
            index / (select.source_fps or 1.0),
            str(item) if isinstance(item, (str, os.PathLike)) else f"frame {index}",
            partial(_load, item, index),
        )
        for index, item in enumerate(content)
    )


def pinned(chunks: Generator[FrameChunk, None, None]) -> Generator[FrameChunk, None, None]:
    """Move frames to page-locked memory, which a GPU can copy from while it computes."""
    with contextlib.closing(chunks):
        for chunk in chunks:
            yield replace(chunk, frames=chunk.frames.pin_memory())


def probe(source: Any) -> SourceInfo:
    """Return the number and size of the frames of any source that :func:`open_frames` takes.

    At most one frame is read, and none of an iterator, a pipe or a live input.
    """
    content = _open(source)
    if isinstance(content, Input) and (content.live or content.once):
        return SourceInfo()
    if isinstance(content, (Path, Input)):
        with decoder.open_video(content, threads=False) as video:
            with contextlib.closing(video.items()) as items:
                first = next((item for item in items if not isinstance(item, LostFrames)), None)
            if first is None:
                raise FrameError(f"{content} has a video stream, but no frame of it can be decoded")
            height, width = video.pixels(first[1]).shape[-2:]
            timeline = video.timeline
            rate = float(1 / timeline.step) if timeline.step else None
            frames = video.stream.frames or round((timeline.promised_seconds() or 0) * (rate or 0))
            times_from = "container" if timeline.has_times else "frame rate"
            offset = float(timeline.origin)
            return SourceInfo(frames or None, height, width, rate, times_from, offset)
    if isinstance(content, (Tensor, list, tuple)):
        single = _single_image(content)
        frame = files.read_image(single, warn=False) if single else _load(content[0], 0)
        count = files.count_pages(single) if single else len(content)
        return SourceInfo(count, *frame.shape[-2:])
    return SourceInfo(len(content) if isinstance(content, Sized) else None)


def _open(source: Any, live: bool | None = None) -> Path | Input | Tensor | Iterable[Any]:
    """Resolve a source to a video, a clip (T, 3, H, W), or single frames and image files."""
    is_path = isinstance(source, (str, os.PathLike))
    content = files.resolve(source) if is_path else as_input(source)
    if isinstance(content, Input):
        # a live input read as a file cannot be read again
        once = content.once or (live is False and content.live)
        return replace(content, live=content.live if live is None else live, once=once)
    if live:
        raise FrameError(f"live is for URLs, devices and pipes, not for {name_of(source)}")
    if content is not None:
        return content
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
            "file, a URL, a binary file object, a camera's number, an image folder, a pattern, a "
            "tensor (T, 3, H, W), an array (T, H, W, 3), or a list or iterator of single frames"
        )
    if isinstance(source, (list, tuple)) and not source:
        raise FrameError("got zero frames: an empty list")
    return source


def _single_image(content: Any) -> Path | None:
    """Return the file of a list of one image, which may hold several pages."""
    single = isinstance(content, list) and len(content) == 1 and isinstance(content[0], Path)
    return content[0] if single else None


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


def name_of(source: Any, content: Any = None) -> str:
    """Return a source's name in messages."""
    if isinstance(content, Input):
        return content.name
    is_path = isinstance(source, (str, os.PathLike))
    return str(source) if is_path else f"the {type(source).__name__} of frames"


@dataclass
class _Chunks:
    """Collects the pixels of frames into chunks."""

    source: str
    size: int  # frames per chunk
    delivered: int
    select: FrameSelection
    one_size: bool
    eager: bool  # yield a full chunk at once; else with the losses up to the next frame
    lost: list[float] = field(default_factory=list)  # since the last chunk
    lost_count: int = 0
    first_lost: list[float] = field(default_factory=list)  # a few, for the message
    reason: str = ""
    frames: Tensor = field(default_factory=lambda: torch.empty(0))  # (size, 3, H, W) uint8
    times: list[float] = field(default_factory=list)  # of the frames filled so far

    def of(
        self, selected: Generator[PendingFrame | LostFrames, None, None]
    ) -> Generator[FrameChunk, None, None]:
        """Yield chunks of frames; report errors and losses after the frames before them."""
        shape: tuple[int, ...] = ()
        failure: Exception | None = None
        with contextlib.closing(selected):
            try:
                for item in selected:
                    pixels = self._load(item)
                    if pixels is None or not isinstance(item, PendingFrame):
                        continue
                    changed = tuple(pixels.shape) != shape
                    if self.times and (changed or len(self.times) == self.size):
                        yield self._chunk()
                    if changed and shape and self.one_size:
                        name, size = f"{item.name} of {self.source}", pixels.shape[-2:]
                        raise other_size(size, first=shape[-2:], seconds=item.time, name=name)
                    shape = tuple(pixels.shape)
                    if not self.times:
                        self.frames = pixels.new_empty((self.size, *shape), dtype=torch.uint8)
                    self.frames[len(self.times)] = pixels
                    self.times.append(item.time)
                    del item, pixels  # not kept alive
                    if self.eager and len(self.times) == self.size:
                        yield self._chunk()
            except Exception as error:
                failure = error
            if self.times:
                yield self._chunk()
        if self.lost_count:
            lost = damage(self.first_lost, self.reason, self.lost_count)
            logger.warning("%s %s", self.source, lost)
            if failure is None and not self.delivered:
                failure = FrameError(f"{self.source} holds nothing but damage ({self.reason})")
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # breaks the cycle of an error and its traceback

    def _load(self, item: PendingFrame | LostFrames | None) -> Tensor | None:
        """Return the pixels of a frame, ``None`` if they are lost."""
        if isinstance(item, PendingFrame):
            try:
                pixels = item.load()
                if pixels.dtype != torch.uint8:
                    pixels = (pixels.detach().float() * 255).round_().clamp_(0, 255)
                return pixels
            except files.DamagedImageError as error:
                item = LostFrames((item.time,), str(error))
        if item is not None:
            if self.select.on_damage == "error":
                count = len(item.times) + item.unlisted
                raise DamagedError(f"{self.source} {damage(item.times, item.reason, count)}")
            self.lost += item.times
            self.lost_count += len(item.times) + item.unlisted
            self.first_lost = sorted([*self.first_lost, *item.times])[:_NAMED]
            self.reason = self.reason or item.reason
        return None

    def _chunk(self) -> FrameChunk:
        """Return the frames so far as a chunk, and begin the next one."""
        seconds = torch.tensor(self.times, dtype=torch.float64)
        lost = tuple(sorted(self.lost))
        chunk = FrameChunk(self.frames[: len(seconds)], seconds, self.delivered, lost)
        self.delivered += len(seconds)
        self.frames, self.times, self.lost = torch.empty(0), [], []
        return chunk


def other_size(
    size: Sequence[int], *, first: Sequence[int], seconds: float, name: str = ""
) -> FrameError:
    """Return the error for a frame of another size ``(H, W)`` than the first frame's."""
    return FrameError(
        f"{name or f'the frame at {seconds:g} s'} is {size[0]} x {size[1]}, but the first frame is "
        f"{first[0]} x {first[1]}; resize the frames to one size, size=(height, width) (--size), "
        f"or stop before this one, end={seconds} (--end)"
    )


def damage(times: Sequence[float], reason: str, count: int | None = None) -> str:
    """Describe lost frames; ``count`` is their number if ``times`` is incomplete."""
    count = len(times) if count is None else count
    at = ", ".join(f"{time:g}" for time in sorted(times)[:_NAMED])
    more = ", ..." if count > _NAMED else ""
    frames = "frame" if count == 1 else "frames"
    return f"lost {count} {frames} ({reason}), at {at}{more} s"
