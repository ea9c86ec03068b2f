"""Video files, decoded frame by frame with PyAV (extra ``video``), through damage."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import re
import struct
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.selection import LostFrames, PendingFrame

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

# how many seconds before a time to look for a keyframe, in turn, until one is found in time
_SEEK_MARGINS = (0, 2, 16)
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")  # FFmpeg reads any text as a film of characters
_ATTACHED_PICTURE, _DEFAULT = 0x0400, 0x0001  # AV_DISPOSITION_*: the cover of a song, the default
_OUTPUT_CORRUPT = 0x0008  # AV_CODEC_FLAG_*: frames that the decoder patched up are delivered
_NO_TIMESTAMPS, _MAY_RESTART = 0x0080, 0x0200  # AVFMT_NOTIMESTAMPS, AVFMT_TS_DISCONT
_HEADER_BYTES = 1 << 20  # read at both ends of a file that may be encrypted
_DEMUX_ERRORS = 100  # after which the rest of a file is given up


@dataclass(frozen=True)
class FileRange:
    """A file that lies inside another one, such as an uncompressed member of a tar archive."""

    path: Path  # the file it lies in
    start: int  # its first byte
    size: int  # its length in bytes
    name: str  # its name there

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
    times_from: str = "position"  # or "container", or "frame rate" where a video stores no times
    offset: float = 0.0  # seconds of a container's clock at the first frame, where times are 0


class Video:
    """An open video: the stream of its pictures, decoded in the order in which they are shown.

    Times are seconds since the first frame. ``step`` is the time between frames, 0 if unknown, and
    ``origin`` the container's time of the first frame.
    """

    def __init__(
        self,
        source: VideoSource,
        container: InputContainer,
        stream: VideoStream,
        *,
        threads: bool = True,
        fps: float | None = None,
    ) -> None:
        self.source, self.container, self.stream = source, container, stream
        self.base = stream.time_base or Fraction(0)
        flags = int(container.format.flags)
        # AVI and raw streams have no presentation times: what a demuxer gives is a guess
        self.has_times = container.format.name != "avi" and not flags & _NO_TIMESTAMPS
        self.seekable = self.has_times and not flags & _MAY_RESTART
        # without presentation times, frames must come out as their packets go in
        self.threads = threads and self.has_times
        self.raw = bool(flags & _NO_TIMESTAMPS)
        rate = stream.average_rate if self.has_times else stream.guessed_rate
        self.step = 1 / rate if rate else Fraction(0)
        self._speed = Fraction(1)  # of a frame rate that was given
        if fps is not None and not self.has_times:
            self._speed = (Fraction(1) / Fraction(fps)) / (self.step or 1)
            self.step = 1 / Fraction(fps)
        self.origin: Fraction | None = None
        self.needed: Container[Fraction] | None = None  # times of frames not to be left out
        self.patched: list[float] = []  # times of frames that the decoder repaired
        self._damage = ""  # the first thing that was wrong
        self._from_start = True
        self._begun = False  # whether a frame was decoded that refers to another one
        self._packets_read = 0
        self._waiting: list[Fraction] = []  # heap: the container's times of frames to come
        self._shift = Fraction(0)  # of a clock that started again
        self._latest: Fraction | None = None
        self._end = self._widest_gap = Fraction(0)
        self._turn: tuple[int, int, int, int] | None = None  # (a, b, c, d) of the display matrix

    @property
    def constant_rate(self) -> bool:
        """Whether the file says that all frames are equally far apart."""
        return bool(self.step) and self.stream.average_rate == self.stream.base_rate

    def items(self) -> Generator[tuple[Fraction, VideoFrame] | LostFrames, None, None]:
        """Decode from here to the end: frames with their times, and what damage took.

        Raises:
            ThreadsDamaged: with several threads, at the first error: what it reaches is only known
                where one frame is decoded after the other.
        """
        for packet in self._packets():
            time = self._expect(packet)
            if self.needed is not None:
                spare = time is not None and time - (self.origin or 0) not in self.needed
                self.stream.codec_context.skip_frame = "NONREF" if spare else "DEFAULT"
            try:
                frames = self.stream.decode(packet)
            except pyav().error.FFmpegError as error:
                if self._latest is None and packet.size and not packet.is_keyframe:
                    continue  # a recording may begin between keyframes
                if self._latest is None and _is_encrypted(self.source):
                    raise FrameError(f"{self.source} is encrypted; decrypt it first") from error
                if self.threads:
                    raise ThreadsDamaged from error
                self._note(reason(error))
                if time is not None and not self.has_times:
                    self._waiting.remove(time)
                    yield LostFrames((float(time),), self._damage)
                continue
            for frame in frames:
                leading = frame.is_corrupt and not frame.key_frame
                if leading and not self._damage and not self._begun:
                    continue  # it refers to frames before the first keyframe
                self._begun = self._begun or not (frame.key_frame or frame.is_corrupt)
                shown = self._time(frame)
                if frame.is_corrupt:
                    self._note("the decoder repaired frames")
                    self.patched.append(float(shown))
                yield from self._lost(self._missing_before(shown))
                lasts = (getattr(frame, "duration", 0) or 0) * self.base or self.step
                if self._latest is not None:
                    self._widest_gap = max(self._widest_gap, shown - self._latest)
                self._latest, self._end = shown, max(self._end, shown + lasts)
                yield shown, frame
        yield from self._lost(self._missing_at_end())

    def items_from(self, start: Fraction) -> Generator[tuple[Fraction, VideoFrame] | LostFrames]:
        """Decode from a keyframe at or before a time, or raise :class:`NotSeekable`."""
        if self.seekable and self.origin is None:
            with contextlib.closing(self.items()) as items:
                next(items, None)
        for margin in _SEEK_MARGINS if self.seekable else ():
            place = max(start - margin, Fraction(0)) + (self.origin or 0)
            try:
                ticks = int(place / self.base)
                self.container.seek(ticks, stream=self.stream, backward=True)
            except (pyav().error.FFmpegError, OSError, ZeroDivisionError):
                break  # not every container can
            self._from_start = self._begun = False
            self._latest, self._waiting = None, []
            items = self.items()
            first = next(items, None)
            if isinstance(first, tuple) and first[0] <= start and first[1].pts is not None:
                yield from itertools.chain([first], items)
                return
            items.close()
        raise NotSeekable

    def _packets(self) -> Iterator[Packet[Any]]:
        """Yield the stream's packets, an empty one last; one that is cut off is left out."""
        may_be_cut = "mpegts" not in self.container.format.name  # a broadcast may be cut anywhere
        held: Packet[Any] | None = None  # a damaged one, which is cut off if it is the last
        for _ in range(_DEMUX_ERRORS):
            try:
                for packet in self.container.demux(self.stream):
                    at_end = not packet.size and packet.dts is None
                    if held is not None:
                        if at_end and may_be_cut:
                            self._expect(held)
                            self._note("its last packet is cut off")
                        else:
                            yield held
                    held = packet if packet.is_corrupt and packet.size else None
                    if held is None and (packet.size or at_end):
                        yield packet
                return
            except (pyav().error.FFmpegError, OSError) as error:
                self._note(reason(error))

    def _expect(self, packet: Packet[Any]) -> Fraction | None:
        """Note a packet before it is decoded; return the time that its frame will take up."""
        if not packet.size:
            return None
        if packet.is_corrupt:
            self._note("a packet is damaged")
        time: Fraction | None = None
        if not self.has_times:  # packets are equally far apart, but not in the order of showing
            time = self._packets_read * self.step
            if packet.dts is not None:
                time = packet.dts * self.base * self._speed
            self.origin = Fraction(0)
        elif packet.pts is not None and not packet.is_discard:
            time = packet.pts * self.base
            if self.origin is None and packet.is_keyframe:
                self.origin = time
        self._packets_read += 1
        if time is not None:
            heapq.heappush(self._waiting, time)
        return time

    def _time(self, frame: VideoFrame) -> Fraction:
        """Decide when a frame is shown; nothing else does.

        A container's presentation times count where it stores some. Elsewhere the n-th frame that
        is shown takes the n-th of its packets' times, at the stream's frame rate.
        """
        after = Fraction(0) if self._latest is None else self._latest + self.step
        if not self.has_times:
            return heapq.heappop(self._waiting) if self._waiting else after
        if frame.pts is None:
            return after
        time = frame.pts * self.base
        if self.origin is None or (self._latest is None and self._from_start):
            self.origin = time if self.origin is None else min(self.origin, time)
        time += self._shift - self.origin
        if self._latest is not None and time < self._latest:
            decoded = (frame.dts or 0) * self.base + self._shift - self.origin
            if decoded > self._latest:  # a damaged time
                return decoded
            self._shift += after - time  # the clock started again
            time = after
        return time

    def _missing_before(self, shown: Fraction) -> list[Fraction]:
        """Times before a frame of which no frame came, once anything was damaged."""
        if not self.has_times:
            return []
        expected = []
        while self._waiting and self._waiting[0] + self._shift - (self.origin or 0) <= shown:
            expected.append(heapq.heappop(self._waiting) + self._shift - (self.origin or 0))
        if not self._damage:
            return []
        if self.constant_rate and self._latest is not None:
            count = round((shown - self._latest) / self.step) - 1
            return [self._latest + number * self.step for number in range(1, count + 1)]
        first = Fraction(0) if self._latest is None else self._latest
        return [time for time in expected if first <= time < shown and time != self._latest]

    def _missing_at_end(self) -> list[Fraction]:
        """Times that the file promises after the last frame.

        By the number of packets where the header has it, else by the duration. Containers round,
        and frames may be dropped at the end, so half a second may be missing, but no more than a
        tenth of a short clip, and at least twice the widest gap between frames, as the last frame
        of a still scene may stand for long.
        """
        expected = []
        if self._damage and self._latest is not None:
            offset = self._shift - (self.origin or 0) if self.has_times else Fraction(0)
            expected = sorted(
                time + offset for time in self._waiting if time + offset > self._latest
            )
        if self._latest is None:
            return []
        last = max([self._latest, *expected])
        count = 0
        counted = self._from_start and self.container.format.name.startswith(("mov", "avi"))
        if counted and self.stream.frames:
            count = self.stream.frames - self._packets_read
        elif (seconds := self.promised_seconds()) is not None:
            slack = max(min(0.5, 0.1 * seconds), 2 * float(self._widest_gap))
            if float(self._end) < seconds - slack:
                count = round((seconds - float(self._end)) / float(self.step)) if self.step else 1
                count -= len(expected)
        if count > 0:
            self._note("it ends before what its header promises")
        return [*expected, *(last + number * self.step for number in range(1, count + 1))]

    @property
    def times_from(self) -> str:
        """``"container"``, or ``"frame rate"`` where it stores no presentation times."""
        return "container" if self.has_times else "frame rate"

    def check_rate(self, fps: float | None) -> None:
        """Say that the rate of a raw stream is a guess, or refuse one for times that are known."""
        if fps is not None and self.has_times:
            raise FrameError(f"{self.source} has times of its own; leave out source_fps")
        if fps is None and self.raw:
            rate = f"{float(1 / self.step):g}" if self.step else "no"
            told = "%s stores no times: %s frames/s is a guess from its stream; give source_fps"
            logger.warning(told, self.source, rate)

    def promised_seconds(self) -> float | None:
        """How long the file says that its pictures last, if it does."""
        first = float(self.origin or 0)
        alone = len(self.container.streams) == 1  # else it may be the sound that lasts so long
        if self.stream.duration and (alone or "asf" not in self.container.format.name):
            return float(self.stream.duration * self.base)
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.stream.metadata.get("DURATION", ""))
        if tag is not None:  # Matroska's
            hours, minutes, seconds = map(float, tag.groups())
            return 3600 * hours + 60 * minutes + seconds - first
        return self.container.duration / 1e6 - first if self.container.duration and alone else None

    def _lost(self, times: list[Fraction]) -> Iterator[LostFrames]:
        if times:
            yield LostFrames(tuple(map(float, times)), self._damage)

    def _note(self, damage: str) -> None:
        self._damage = self._damage or damage

    def pending(self, time: Fraction, frame: VideoFrame) -> PendingFrame:
        """Return a decoded frame whose pixels are converted on request."""
        return PendingFrame(time, f"the frame at {float(time):g} s", partial(self.pixels, frame))

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


class ThreadsDamaged(Exception):  # noqa: N818  # handled in this module
    """Several threads met damage: decode again with one, which tells what it reaches."""


class NotSeekable(Exception):  # noqa: N818  # handled where videos are read
    """Decoding cannot begin at this time: decode from the start of the file."""


@contextlib.contextmanager
def open_video(
    source: VideoSource,
    *,
    threads: bool = True,
    stream_index: int | None = None,
    fps: float | None = None,
) -> Iterator[Video]:
    """Open a video and choose the stream of its pictures, else :class:`FrameError`.

    By default the one that the file marks as default, else the largest. ``fps`` replaces the frame
    rate of a file that stores no presentation times.
    """
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
        stream = _choose_stream(source, container, stream_index)
        codec = stream.codec_context
        if codec is None:
            raise FrameError(f"{source} holds video that this FFmpeg cannot decode, or is damaged")
        if codec.name in _TEXT_CODECS:
            raise FrameError(f"{source} cannot be read as a video (it looks like text); {hint}")
        codec.flags |= _OUTPUT_CORRUPT
        video = Video(source, container, stream, threads=threads, fps=fps)
        stream.thread_type = "AUTO" if video.threads else "NONE"
        codec.thread_count = 0 if video.threads else 1
        try:
            yield video
        finally:
            # the decoder's threads come to rest while others may run: PyAV frees a decoder with
            # the interpreter locked, and a thread that is logging would wait for that lock
            codec.flush_buffers()


def _choose_stream(
    source: VideoSource, container: InputContainer, index: int | None
) -> VideoStream:
    def disposition(stream: VideoStream) -> int:
        return int(getattr(stream, "disposition", 0) or 0)

    streams = [s for s in container.streams.video if not disposition(s) & _ATTACHED_PICTURE]
    kinds = ", ".join(f"{stream.index}: {stream.type}" for stream in container.streams) or "none"
    if index is not None:
        chosen = [stream for stream in streams if stream.index == index]
        if not chosen:
            raise FrameError(f"{source} has no video stream {index} (streams: {kinds})")
        return chosen[0]
    if not streams:
        raise FrameError(f"{source} has no video stream (streams: {kinds})")
    best = max(
        streams,
        key=lambda s: (disposition(s) & _DEFAULT, (s.width or 0) * (s.height or 0), -s.index),
    )
    if len(streams) > 1:
        others = ", ".join(str(stream.index) for stream in streams if stream is not best)
        told = "%s: reading video stream %d (%d x %d); others by stream_index: %s"
        logger.info(told, source, best.index, best.height, best.width, others)
    return best


def decode_video(
    source: VideoSource,
    start: float | None = None,
    *,
    stream_index: int | None = None,
    fps: float | None = None,
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield the frames of a video file at the times at which they are shown.

    Times are seconds since the first frame, and may be unevenly spaced. Pixels become 8-bit RGB,
    rotated upright by the display matrix; transparency is dropped and non-square pixels are not
    resampled. Frames before second ``start`` may be left out: decoding begins at a keyframe.
    Frames lost to damage are reported in their place.

    Raises:
        FrameError: not a video, or a video without frames.
    """
    done = 0  # items yielded
    empty, seek, threads = True, bool(start), True
    while True:
        with open_video(source, threads=threads, stream_index=stream_index, fps=fps) as video:
            items = video.items_from(Fraction(start or 0)) if seek else video.items()
            try:
                with contextlib.closing(items):
                    for number, item in enumerate(items):
                        if number < done:
                            continue
                        done += 1
                        empty = empty and isinstance(item, LostFrames)
                        yield item if isinstance(item, LostFrames) else video.pending(*item)
            except ThreadsDamaged:
                threads = False
            except NotSeekable:
                seek = False
            else:
                break
            finally:
                if video.patched and done:
                    told = "%s is damaged: the decoder concealed errors in %d frames, from %g s on"
                    logger.warning(told, source, len(video.patched), video.patched[0])
    if empty:
        raise FrameError(f"{source} has a video stream, but no frame of it can be decoded")


def _is_encrypted(source: VideoSource) -> bool:
    """Whether an MP4 file says that its pictures are encrypted, which PyAV does not tell."""
    path, start, size = (source, 0, source.stat().st_size) if isinstance(source, Path) else (
        source.path, source.start, source.size
    )  # fmt: skip
    with path.open("rb") as file:
        for place in (start, max(start, start + size - _HEADER_BYTES)):  # where indexes are
            file.seek(place)
            header = file.read(min(size, _HEADER_BYTES))
            if b"encv" in header and b"sinf" in header:
                return True
    return False


def reason(error: BaseException) -> str:
    """Return an error's text without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


def pyav() -> Any:
    """Import PyAV, or say which extra brings it."""
    return imports.require("av", extra="video", purpose="reading video files")
