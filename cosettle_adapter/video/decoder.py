"""Video files, decoded frame by frame with PyAV (extra ``video``)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.selection import PendingFrame

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

# seconds before ``start`` to seek to, tried in turn until decoding begins early enough
_SEEK_MARGINS = (0.0, 2.0, 16.0)
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")  # FFmpeg decodes any text as an animation
_ATTACHED_PICTURE = 0x0400  # AV_DISPOSITION_ATTACHED_PIC: cover art of an audio file


@dataclass(frozen=True)
class FileRange:
    """A file stored inside another one, such as an uncompressed member of a tar archive."""

    path: Path  # the containing file
    start: int  # offset of the first byte
    size: int  # bytes
    name: str  # inside the containing file

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


VideoSource = Path | FileRange


@dataclass(frozen=True)
class SourceInfo:
    """Properties of a source that are cheap to read; ``None`` where unknown."""

    frames: int | None = None  # for a video, the number in its header
    height: int | None = None  # of the upright frames
    width: int | None = None
    fps: float | None = None  # of a video


class Video:
    """An open video stream, which tracks how much of its announced duration was read."""

    def __init__(self, source: VideoSource, container: InputContainer, stream: VideoStream) -> None:
        self.source, self.container, self.stream = source, container, stream
        # seconds per tick and average seconds per frame; 0 if unknown
        self.base = stream.time_base or Fraction(0)
        self.step = 1 / stream.average_rate if stream.average_rate else Fraction(0)
        self.seconds: float | None = None  # announced duration
        self._display_matrix: tuple[int, int, int, int] | None = None  # (a, b, c, d)
        self._start = float((stream.start_time or 0) * self.base)
        self._frames_read = 0
        self._last_time = self._frames_end = self._widest_gap = 0.0
        self._reached = 0.0  # end of the frames read, or of other streams if these count
        self._truncated = False
        self._spans_streams = False  # whether the duration may be that of the sound
        if stream.frames and container.format.name == "avi":
            # the duration of a cut AVI file is estimated from its size; its frame count is not
            self.seconds = float(stream.frames * self.base)
        elif stream.duration:
            self.seconds = float(stream.duration * self.base)
        elif tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(float, tag.groups())  # Matroska's
            self.seconds = 3600 * hours + 60 * minutes + seconds - self._start
        elif container.duration:
            self.seconds = container.duration / 1e6 - self._start
            self._spans_streams = True

    def seek(self, ticks: int) -> None:
        """Seek to the keyframe at or before a time; raise :class:`FrameError` on failure."""
        try:
            self.container.seek(ticks, stream=self.stream, backward=True)
        except (pyav().error.FFmpegError, OSError) as error:
            raise FrameError(f"seeking fails ({reason(error)})") from error

    def packets(self) -> Iterator[Packet[Any]]:
        """Yield the stream's packets, an empty one last; leave out a truncated last packet."""
        # the recording of a broadcast may end within a packet
        may_be_truncated = "mpegts" not in self.container.format.name
        damaged: Packet[Any] | None = None  # truncated if it is the last one
        for packet in self.container.demux():
            if packet.stream.index != self.stream.index:
                is_media = packet.stream.type in ("audio", "video")
                if self._spans_streams and is_media and packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._reached = max(self._reached, end - self._start)
                continue
            at_end = not packet.size and packet.dts is None
            if damaged is not None:
                self._truncated = at_end and may_be_truncated
                if not self._truncated:
                    yield damaged
            damaged = packet if packet.is_corrupt and packet.size else None
            if damaged is None and (packet.size or at_end):
                yield packet

    def frames(
        self, prepare: Callable[[Packet[Any]], None] = lambda packet: None
    ) -> Generator[VideoFrame, None, None]:
        """Decode from the current position to the end; call ``prepare`` before each packet."""
        started = False
        for packet in self.packets():
            prepare(packet)
            try:
                frames = self.stream.decode(packet)
            except pyav().error.InvalidDataError:
                if started:
                    raise
                continue  # a recording may begin between keyframes
            started = started or bool(frames)
            yield from frames

    def timed_frames(self, *, from_start: bool) -> Generator[tuple[VideoFrame, float], None, None]:
        """Decode to the end; yield frames with their seconds from the start of the stream."""
        count = 0
        damaged = False
        origin = self.stream.start_time
        time = -self.step
        try:
            for frame in self.frames():
                if frame.pts is None:  # assume the average frame rate
                    time += self.step
                else:
                    origin = frame.pts if origin is None else origin
                    time = (frame.pts - origin) * self.base
                self.note_frame(time, (getattr(frame, "duration", 0) or 0) * self.base or self.step)
                if frame.is_corrupt and not damaged:
                    damaged = True
                    logger.warning("%s is damaged: the decoder concealed the errors", self.source)
                yield frame, float(time)
                count += 1
        except (pyav().error.FFmpegError, OSError) as error:
            message = f"{self.source} breaks off ({reason(error)}): {self._progress(from_start)}"
            raise TruncatedVideoError(message, frames_read=count) from error
        self.check_complete(count, from_start=from_start)
        if not count:
            raise FrameError(f"{self.source} has a video stream, but no frame can be decoded")

    def note_frame(self, time: Fraction, duration: Fraction) -> None:
        """Count a frame as read; ``time`` is in seconds from the start of the stream."""
        if self._frames_read:
            self._widest_gap = max(self._widest_gap, float(time) - self._last_time)
        self._frames_read += 1
        self._last_time = float(time)
        self._frames_end = max(self._frames_end, float(time + duration))
        self._reached = max(self._reached, self._frames_end)

    def check_complete(self, count: int, *, from_start: bool) -> None:
        """Raise :class:`TruncatedVideoError` if the file ended before its announced duration.

        Containers round durations and may drop frames at the end, so half a second, or a tenth of
        a short clip, may be missing; and at least twice the widest gap between frames, because the
        last frame of a still scene may be shown for long.
        """
        if not self._truncated:
            complete = from_start and 0 < self.stream.frames <= self._frames_read
            if self.seconds is None or complete:
                return
            slack = max(min(0.5, 0.1 * self.seconds), 2 * self._widest_gap)
            if self._reached >= self.seconds - slack:
                return
        message = f"{self.source} ends early: {self._progress(from_start)}"
        raise TruncatedVideoError(message, frames_read=count)

    def _progress(self, from_start: bool) -> str:
        total = f" of {self.stream.frames}" if self.stream.frames else ""
        frames = f"{self._frames_read}{total} frames, " if from_start else ""
        length = "unknown length" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"read {frames}{self._frames_end:.2f} s of {length}"

    def pixels(self, frame: VideoFrame) -> Tensor:
        """Convert a decoded frame to (3, H, W) uint8 RGB, rotated and mirrored upright.

        The display matrix, x' = a x + c y and y' = b x + d y, is rounded to quarter turns.
        """
        if self._display_matrix is None:
            # reading its side data keeps a frame and its decoder alive until garbage collection,
            # so read that of a small copy, once per file
            thumbnail = frame.reformat(width=16, height=16, format="gray")
            matrix: Any = thumbnail.side_data.get("DISPLAYMATRIX")
            a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix else (1, 0, 0, 0, 1)
            self._display_matrix = (a, b, c, d)
        pixels = rearrange(torch.from_numpy(frame.to_ndarray(format="rgb24")), "h w c -> c h w")
        a, b, c, d = self._display_matrix
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels = rearrange(pixels, "c h w -> c w h")
            a, d = c, b
        mirrored = [axis for axis, factor in ((-1, a), (-2, d)) if factor < 0]
        return pixels.flip(mirrored) if mirrored else pixels


@contextlib.contextmanager
def open_video(source: VideoSource, *, threads: bool = True) -> Iterator[Video]:
    """Open a video and its first video stream; raise :class:`FrameError` if there is none."""
    av = pyav()
    imports.require("numpy", extra="video", purpose="reading video files")
    hint = "it is not a video, or its end, which holds the index, is missing"
    if str(source).lower().endswith((".npy", ".npz", ".pt", ".pth")):
        hint = "load it with numpy.load or torch.load and pass the frames"
    url = f"file:{source}"  # without the prefix, a colon in the name would end a protocol
    if isinstance(source, FileRange):
        end = source.start + source.size
        url = f"subfile,,start,{source.start},end,{end},,:file:{source.path}"
    try:
        container = av.open(url, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError(f"{source} cannot be read as a video ({reason(error)}); {hint}") from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not int(getattr(stream, "disposition", 0) or 0) & _ATTACHED_PICTURE
        ]
        if not streams:
            kinds = ", ".join(stream.type for stream in container.streams) or "none"
            raise FrameError(f"{source} has no video stream (streams: {kinds})")
        codec = streams[0].codec_context
        if codec is None:
            raise FrameError(f"{source} holds video that this FFmpeg cannot decode, or is damaged")
        if codec.name in _TEXT_CODECS:
            raise FrameError(f"{source} cannot be read as a video (it looks like text); {hint}")
        streams[0].thread_type = "AUTO" if threads else "NONE"
        if not threads:
            codec.thread_count = 1
        try:
            yield Video(source, container, streams[0])
        finally:
            # PyAV frees a decoder while it holds the GIL, and would deadlock with a decoder thread
            # that waits for the GIL to log; flushing stops these threads with the GIL released
            codec.flush_buffers()


def decode_video(
    source: VideoSource, start: float | None = None
) -> Generator[PendingFrame, None, None]:
    """Yield the frames of a video file with their presentation times.

    Times are the file's own, in seconds from the start of the stream, and may be unevenly spaced.
    Pixels become 8-bit RGB, rotated upright by the display matrix; transparency is dropped and
    non-square pixels are not resampled. Frames before second ``start`` may be left out: decoding
    begins at a keyframe.

    Raises:
        FrameError: not a video, or a video without frames.
        TruncatedVideoError: the file is damaged, or ends before its announced duration; all
            readable frames were yielded before.
    """
    start = start or 0.0
    for margin in (*(margin for margin in _SEEK_MARGINS if start > margin), None):
        with (
            open_video(source) as video,
            contextlib.closing(video.timed_frames(from_start=margin is None)) as timed,
        ):
            try:
                if margin is not None:
                    ticks = int((start - margin) / (video.base or 1))
                    video.seek(ticks + (video.stream.start_time or 0))
                first = next(timed)
            except FrameError:
                if margin is None:
                    raise
                continue  # not every container supports seeking
            if margin is None or (first[0].pts is not None and first[1] <= start):
                for frame, time in itertools.chain([first], timed):
                    load = partial(video.pixels, frame)
                    yield PendingFrame(time, f"the frame at {time:g} s", load)
                return


def reason(error: BaseException) -> str:
    """Return an error's text without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


def pyav() -> Any:
    """Import PyAV, or raise :class:`MissingExtraError`."""
    return imports.require("av", extra="video", purpose="reading video files")
