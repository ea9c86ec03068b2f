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

logger = logging.getLogger(__name__)

_NAMED = 8  # times that a message lists


@dataclass(frozen=True, eq=False)
class FrameChunk:
    """Consecutive frames of a source."""

    frames: Tensor  # (N, 3, H, W) uint8
    timestamps: Tensor  # (N,) float64 seconds since the first frame of the source
    start: int  # number of frames delivered before this chunk
    lost: tuple[float, ...] = ()  # seconds of frames that damage took, in this chunk or around it


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

    Damage takes only the frames it reaches: a warning and ``chunk.lost`` say which, or an error if
    ``select.on_damage`` is ``"error"``.

    Args:
        source: a video file; a folder of images or a glob pattern, read in natural order
            (``frame2`` before ``frame10``); a list of image files; frames in memory as
            :func:`as_frames` takes them; or an iterator of single frames, which is not closed.
            Float frames in [0, 1] are rounded to uint8.
        select: the frames to read; all by default.
        skip: number of selected frames to skip at the start, without converting their pixels.
        chunk_size: frames per chunk; the last chunk may hold fewer.
        one_size: refuse frames of another size; otherwise they begin a new chunk.

    Raises:
        FrameError: at once for unusable arguments and sources; while reading, after the frames
            before it, for a frame of another size, a range without frames, or nothing but damage.
        DamagedError: for frames lost to damage, after those before them, if so selected.
    """
    select = select or FrameSelection()
    if skip < 0:
        raise FrameError(f"skip must be at least 0, got {skip}")
    if chunk_size < 1:
        raise FrameError(f"chunk_size must be at least 1, got {chunk_size}")
    name = name_of(source)
    selected = select.of(pending_frames(source, select), name, skip=skip)
    eager = not isinstance(source, (str, os.PathLike, list))
    return _Chunks(name, chunk_size, skip, select, one_size, eager).of(selected)


def pending_frames(
    source: Any, select: FrameSelection | None = None
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield all frames of a source; frames of a video before ``select.start`` may be left out."""
    select = select or FrameSelection()
    content = _open(source)
    if isinstance(content, Path):
        return decoder.decode_video(content, select, announce=True)
    if pages := _pages(content):
        return (page for page in pages)
    if select.source_fps is None and (select.fps is not None or select.times is not None):
        raise FrameError(
            f"fps and times need the times of frames, which {name_of(source)} does not have; give "
            "its frame rate as source_fps"
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

    At most one frame is read, and an iterator is not advanced.
    """
    content = _open(source)
    if isinstance(content, Path):
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
        return SourceInfo(len(_pages(content) or content), *_load(content[0], 0).shape[-2:])
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


def _pages(content: Any) -> list[PendingFrame]:
    """Frames of a single image file that holds several; else none."""
    single = isinstance(content, list) and len(content) == 1 and isinstance(content[0], Path)
    return files.read_pages(content[0]) if single else []


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


def name_of(source: Any) -> str:
    """Return what messages call a source."""
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
    eager: bool  # yield a full chunk at once; else as soon as it is known what was lost after it
    lost: list[float] = field(default_factory=list)  # since the last chunk
    all_lost: list[float] = field(default_factory=list)
    reason: str = ""

    def of(
        self, selected: Generator[PendingFrame | LostFrames, None, None]
    ) -> Generator[FrameChunk, None, None]:
        """Yield chunks of frames."""
        shape: tuple[int, ...] = ()
        frames: Tensor | None = None
        times: list[float] = []
        failure: Exception | None = None
        with contextlib.closing(selected):
            while True:
                try:
                    item = next(selected, None)
                    pixels = self._load(item)
                except Exception as error:
                    failure, item, pixels = error, None, None
                if item is not None and pixels is None:
                    continue
                changed = pixels is not None and tuple(pixels.shape) != shape
                if frames is not None and (item is None or changed or len(times) == self.size):
                    yield self._chunk(frames[: len(times)], times)
                    frames, times = None, []
                if item is None or pixels is None or not isinstance(item, PendingFrame):
                    break
                if changed and shape and self.one_size:
                    failure = FrameError(
                        f"{item.name} of {self.source} is {pixels.shape[-2]} x {pixels.shape[-1]}, "
                        f"but the first frame is {shape[-2]} x {shape[-1]}; resize the frames to "
                        "one size, size=(height, width)"
                    )
                    break
                shape = tuple(pixels.shape)
                if frames is None:
                    frames = pixels.new_empty((self.size, *shape), dtype=torch.uint8)
                frames[len(times)] = pixels
                times.append(item.time)
                if self.eager and len(times) == self.size:
                    item = pixels = None  # not kept alive
                    yield self._chunk(frames, times)
                    frames, times = None, []
        if self.all_lost:
            logger.warning("%s %s", self.source, damage(self.all_lost, self.reason))
        try:
            if failure is None and not shape and self.all_lost:
                failure = FrameError(f"{self.source} holds nothing but damage ({self.reason})")
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
                raise DamagedError(f"{self.source} {damage(item.times, item.reason)}")
            self.lost += item.times
            self.all_lost += item.times
            self.reason = self.reason or item.reason
        return None

    def _chunk(self, frames: Tensor, times: list[float]) -> FrameChunk:
        seconds = torch.tensor(times, dtype=torch.float64)
        chunk = FrameChunk(frames, seconds, self.delivered, tuple(sorted(self.lost)))
        self.delivered += len(times)
        self.lost = []
        return chunk


def damage(times: Sequence[float], reason: str) -> str:
    """Say how many frames were lost to damage, when and why."""
    at = ", ".join(f"{time:g}" for time in sorted(times)[:_NAMED])
    more = ", ..." if len(times) > _NAMED else ""
    frames = "frame" if len(times) == 1 else "frames"
    return f"is damaged ({reason}): {len(times)} {frames} lost, at {at}{more} s"
