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

# how far before ``start`` to look for a keyframe, in turn, until one is found in time
_SEEK_MARGINS = (0.0, 2.0, 16.0)
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")  # FFmpeg takes any text for a film of characters
_ATTACHED_PICTURE = 0x0400  # AV_DISPOSITION_ATTACHED_PIC: the cover of a song


@dataclass(frozen=True)
class FileRange:
    """A file that lies inside another one, such as an uncompressed member of a tar archive."""

    path: Path  # the file it lies in
    start: int  # its first byte
    size: int  # its length in bytes
    name: str  # what it is called there

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


VideoSource = Path | FileRange


@dataclass(frozen=True)
class SourceInfo:
    """What can be told of a source at little cost; ``fps`` is known of videos only."""

    frames: int | None = None  # of a video what its header promises
    height: int | None = None  # of the frames, upright
    width: int | None = None
    fps: float | None = None


class Video:
    """An open video: the stream of its pictures, and how much was read of what it promises."""

    def __init__(self, source: VideoSource, container: InputContainer, stream: VideoStream) -> None:
        self.source, self.container, self.stream = source, container, stream
        # seconds of a tick, and the average seconds of a frame; 0 if unknown
        self.base = stream.time_base or Fraction(0)
        self.step = 1 / stream.average_rate if stream.average_rate else Fraction(0)
        self.seconds: float | None = None  # promised, as the times below from the stream's start
        self._turn: tuple[int, int, int, int] | None = None  # (a, b, c, d) of the display matrix
        self._first = float((stream.start_time or 0) * self.base)
        self._reached = self._shown = self._latest = self._widest_gap = 0.0
        self._read = 0
        self._cut = False
        self._counts_others = False  # whether the promise may be of another stream, such as sound
        if stream.frames and container.format.name == "avi":
            # the duration of a cut AVI file is estimated from its size; its frame count is not
            self.seconds = float(stream.frames * self.base)
        elif stream.duration:
            self.seconds = float(stream.duration * self.base)
        elif tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(float, tag.groups())  # Matroska's
            self.seconds = 3600 * hours + 60 * minutes + seconds - self._first
        elif container.duration:
            self.seconds = container.duration / 1e6 - self._first
            self._counts_others = True

    def seek(self, ticks: int) -> None:
        """Go to the keyframe at or before a time, else :class:`FrameError`."""
        try:
            self.container.seek(ticks, stream=self.stream, backward=True)
        except (pyav().error.FFmpegError, OSError) as error:
            raise FrameError(f"seeking fails ({reason(error)})") from error

    def packets(self) -> Iterator[Packet[Any]]:
        """Yield the stream's packets, an empty one last; one that is cut off is left out."""
        may_be_cut = "mpegts" not in self.container.format.name  # a broadcast may be cut anywhere
        held: Packet[Any] | None = None  # a damaged one, which is cut off if it is the last
        for packet in self.container.demux():
            if packet.stream.index != self.stream.index:
                seen_or_heard = packet.stream.type in ("audio", "video")
                if self._counts_others and seen_or_heard and packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._reached = max(self._reached, end - self._first)
                continue
            at_end = not packet.size and packet.dts is None
            if held is not None:
                self._cut = at_end and may_be_cut
                if not self._cut:
                    yield held
            held = packet if packet.is_corrupt and packet.size else None
            if held is None and (packet.size or at_end):
                yield packet

    def frames(
        self, prepare: Callable[[Packet[Any]], None] = lambda packet: None
    ) -> Generator[VideoFrame, None, None]:
        """Decode from here to the end; ``prepare`` is called before each packet is decoded."""
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
        """Decode to the end, with seconds from the stream's start."""
        count = 0
        damaged = False
        origin = self.stream.start_time
        time = -self.step
        try:
            for frame in self.frames():
                if frame.pts is None:  # it follows the one before it at the average rate
                    time += self.step
                else:
                    origin = frame.pts if origin is None else origin
                    time = (frame.pts - origin) * self.base
                self.saw_frame(time, (getattr(frame, "duration", 0) or 0) * self.base or self.step)
                if frame.is_corrupt and not damaged:
                    damaged = True
                    logger.warning("%s is damaged: the decoder patched it up", self.source)
                yield frame, float(time)
                count += 1
        except (pyav().error.FFmpegError, OSError) as error:
            message = f"{self.source} breaks off ({reason(error)}): {self._progress(from_start)}"
            raise TruncatedVideoError(message, frames_read=count) from error
        self.check_complete(count, from_start=from_start)
        if not count:
            raise FrameError(f"{self.source} has a video stream, but no frame of it can be decoded")

    def saw_frame(self, time: Fraction, duration: Fraction) -> None:
        """Note a frame: its time from the stream's start, how long it is shown."""
        if self._read:
            self._widest_gap = max(self._widest_gap, float(time) - self._latest)
        self._read, self._latest = self._read + 1, float(time)
        self._shown = max(self._shown, float(time + duration))
        self._reached = max(self._reached, self._shown)

    def check_complete(self, count: int, *, from_start: bool) -> None:
        """Raise :class:`TruncatedVideoError` if the file ended before what its header promises.

        Containers round, and frames may be dropped at the end, so half a second may be missing,
        but no more than a tenth of a short clip, and at least twice the widest gap between frames,
        as the last frame of a still scene may stand for long.
        """
        if not self._cut:
            if self.seconds is None or (from_start and 0 < self.stream.frames <= self._read):
                return
            slack = max(min(0.5, 0.1 * self.seconds), 2 * self._widest_gap)
            if self._reached >= self.seconds - slack:
                return
        message = f"{self.source} ends early: {self._progress(from_start)}"
        raise TruncatedVideoError(message, frames_read=count)

    def _progress(self, from_start: bool) -> str:
        promised = f" of {self.stream.frames}" if self.stream.frames else ""
        frames = f"{self._read}{promised} frames, " if from_start else ""
        length = "unknown length" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"read {frames}{self._shown:.2f} s of {length}"

    def pixels(self, frame: VideoFrame) -> Tensor:
        """Convert a decoded frame to (3, H, W) uint8 RGB, turned and mirrored upright.

        By the display matrix, x' = a x + c y and y' = b x + d y, to the nearest quarter turn.
        """
        if self._turn is None:
            # a frame asked for its side data is kept alive, with its decoder, until garbage is
            # collected, so ask a small copy, and once a file
            thumbnail = frame.reformat(width=16, height=16, format="gray")
            matrix: Any = thumbnail.side_data.get("DISPLAYMATRIX")
            a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix else (1, 0, 0, 0, 1)
            self._turn = (a, b, c, d)
        pixels = rearrange(torch.from_numpy(frame.to_ndarray(format="rgb24")), "h w c -> c h w")
        a, b, c, d = self._turn
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels = rearrange(pixels, "c h w -> c w h")
            a, d = c, b
        mirrored = [axis for axis, factor in ((-1, a), (-2, d)) if factor < 0]
        return pixels.flip(mirrored) if mirrored else pixels


@contextlib.contextmanager
def open_video(source: VideoSource, *, threads: bool = True) -> Iterator[Video]:
    """Open a video and find the stream of its pictures, else :class:`FrameError`."""
    av = pyav()
    imports.require("numpy", extra="video", purpose="reading video files")
    hint = "it is no video, or its end, which holds the index, is missing"
    if str(source).lower().endswith((".npy", ".npz", ".pt", ".pth")):
        hint = "load it with numpy.load or torch.load and pass the frames"
    url = f"file:{source}"  # the prefix keeps a colon in a name from reading as a protocol
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
            # the decoder's threads come to rest while others may run: PyAV frees a decoder with
            # the interpreter locked, and a thread that is logging would wait for that lock
            codec.flush_buffers()


def decode_video(
    source: VideoSource, start: float | None = None
) -> Generator[PendingFrame, None, None]:
    """Yield the frames of a video file with their presentation times.

    Times are seconds from the start of the stream, as the file has them: frames need not be
    evenly spaced. Pixels become 8-bit RGB whatever the format, upright as the file's display
    matrix says; transparency is dropped and pixels are taken as stored, square or not. Frames
    before second ``start`` may be left out, as decoding begins at a keyframe.

    Raises:
        FrameError: not a video, or no frame in it.
        TruncatedVideoError: it breaks, or ends before the length its header promises; all that
            is readable was yielded before.
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
                continue  # not every container can
            if margin is None or (first[0].pts is not None and first[1] <= start):
                for frame, time in itertools.chain([first], timed):
                    load = partial(video.pixels, frame)
                    yield PendingFrame(time, f"the frame at {time:g} s", load)
                return


def reason(error: BaseException) -> str:
    """Return an error's text without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


def pyav() -> Any:
    """Import PyAV, or say which extra brings it."""
    return imports.require("av", extra="video", purpose="reading video files")
