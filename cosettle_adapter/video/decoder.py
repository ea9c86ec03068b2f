"""Video files, decoded frame by frame with PyAV (extra ``video``)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.completeness import Completeness
from cosettle_adapter.video.selection import PendingFrame

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

# how far before ``start`` to look for a keyframe, in turn, until one is found in time
_SEEK_MARGINS = (0.0, 2.0, 16.0)
# FFmpeg takes any text for a film of characters
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")
_ATTACHED_PICTURE = 0x0400  # AV_DISPOSITION_ATTACHED_PIC: the cover of a song
_LOADERS = {".npy": "numpy.load", ".npz": "numpy.load", ".pt": "torch.load", ".pth": "torch.load"}


@dataclass(frozen=True)
class FileRange:
    """A file that lies inside another one, such as an uncompressed member of a tar archive.

    Attributes:
        path: the file it lies in.
        start: its first byte.
        size: its length in bytes.
        name: what it is called there.
    """

    path: Path
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    @property
    def suffix(self) -> str:
        """The suffix of its name, ``.mp4``."""
        return PurePosixPath(self.name).suffix


VideoSource = Path | FileRange


@dataclass(frozen=True)
class SourceInfo:
    """What can be told of a source at little cost.

    Attributes:
        frames: number of frames, or None; for a video what its header promises.
        height: height of the frames, upright, or None.
        width: width of the frames, upright, or None.
        fps: average frames per second of a video, None for other sources.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None


class Video:
    """An open video: the stream of its pictures, and how much was read of what it promises.

    ``base`` is the seconds of a tick and ``step`` the average seconds of a frame, 0 if unknown.
    """

    def __init__(self, source: VideoSource, container: InputContainer, stream: VideoStream) -> None:
        self.source, self.container, self.stream = source, container, stream
        self.base = stream.time_base or Fraction(0)
        self.step = 1 / stream.average_rate if stream.average_rate else Fraction(0)
        self.completeness = Completeness(container, stream)
        self._origin = stream.start_time
        self._time = -self.step

    def seek(self, ticks: int) -> str | None:
        """Go to the keyframe at or before a time; return why not, where it cannot be done."""
        av = pyav()
        try:
            self.container.seek(ticks, stream=self.stream, backward=True)
        except (av.error.FFmpegError, OSError) as error:
            return reason(error)
        return None

    def time_of(self, frame: VideoFrame) -> Fraction:
        """Decide when a frame is shown, in seconds from the stream's start.

        Frames come in order; one without a time follows the one before it at the average rate.
        """
        if frame.pts is None:
            self._time += self.step
        else:
            self._origin = frame.pts if self._origin is None else self._origin
            self._time = (frame.pts - self._origin) * self.base
        return self._time

    def packets(self) -> Iterator[Packet[Any]]:
        """Yield the stream's packets, an empty one last; one that is cut off is left out."""
        may_be_cut = "mpegts" not in self.container.format.name  # a broadcast may be cut anywhere
        held: Packet[Any] | None = None
        for packet in self.container.demux(self.completeness.streams):
            if packet.stream.index != self.stream.index:  # the last packets have no stream_index
                self.completeness.saw_packet(packet)
                continue
            at_end = not packet.size and packet.dts is None
            if held is not None:
                if at_end and may_be_cut:
                    self.completeness.partial_tail = True
                else:
                    yield held
            held = packet if packet.is_corrupt and packet.size else None
            if held is None and (packet.size or at_end):
                yield packet

    def frames(self, prepare: Callable[[Packet[Any]], None] | None = None) -> Iterator[VideoFrame]:
        """Decode from here to the end; ``prepare`` is called before each packet is decoded."""
        av = pyav()
        started = False
        for packet in self.packets():
            if prepare is not None:
                prepare(packet)
            try:
                frames = self.stream.decode(packet)
            except av.error.InvalidDataError:
                if started:
                    raise
                continue  # a recording may begin between keyframes
            started = started or bool(frames)
            yield from frames

    def timed_frames(self, *, from_start: bool) -> Generator[tuple[VideoFrame, float], None, None]:
        """Decode with times to the end of the file, then say whether it came too early.

        Raises:
            FrameError: there is no frame.
            TruncatedVideoError: as in :func:`decode_video`.
        """
        av = pyav()
        count, damaged = 0, False
        try:
            for frame in self.frames():
                time = float(self.time_of(frame))
                lasts = (getattr(frame, "duration", 0) or 0) * self.base or self.step
                self.completeness.saw_frame(time, float(lasts))
                if frame.is_corrupt and not damaged:
                    damaged = True
                    logger.warning(
                        "%s is damaged: the decoder patched up what it could", self.source
                    )
                yield frame, time
                count += 1
        except (av.error.FFmpegError, OSError) as error:
            promise = self.completeness.promise(from_start=from_start)
            raise TruncatedVideoError(
                f"{self.source} breaks off ({reason(error)}): {promise}", frames_read=count
            ) from error
        self.completeness.check(self.source, count, from_start=from_start)
        if not count:
            raise FrameError(f"{self.source} has a video stream, but no frame of it can be decoded")


@contextlib.contextmanager
def open_video(source: VideoSource, *, threads: bool = True) -> Iterator[Video]:
    """Open a video and find the stream of its pictures.

    Args:
        source: a file, or where in a file it lies; nothing is copied out.
        threads: decode with as many threads as FFmpeg likes, not one.

    Raises:
        FrameError: no such file, not a video, or one that cannot be decoded.
        MissingExtraError: PyAV or numpy is not installed.
    """
    av = pyav()
    imports.require("numpy", extra="video", purpose="reading video files")
    hint = "it is no video, or its end, which holds the index, is missing"
    if source.suffix.lower() in _LOADERS:
        hint = f"load it with {_LOADERS[source.suffix.lower()]} and pass the frames"
    try:
        container = av.open(_url(source), metadata_errors="replace")
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


def video_info(source: VideoSource) -> SourceInfo:
    """Read a video's header, and its first frame, which knows how it is turned.

    Raises:
        FrameError: not a video, or nothing in it can be decoded.
    """
    with open_video(source, threads=False) as video:
        fps = float(1 / video.step) if video.step else None
        seconds = video.completeness.seconds
        frames = video.stream.frames or (round(seconds * fps) if seconds and fps else None)
        with contextlib.closing(video.timed_frames(from_start=True)) as timed:
            first, _ = next(timed)
            turn = display_matrix(first)
        height, width = upright(torch.empty(first.height, first.width, 0), turn).shape[:2]
    return SourceInfo(frames, height, width, fps)


def decode_video(
    source: VideoSource, start: float | None = None
) -> Generator[PendingFrame, None, None]:
    """Yield the frames of a video file with their presentation times.

    Times are seconds from the start of the stream, as the file has them: frames need not be
    evenly spaced. Pixels become 8-bit RGB whatever the format, upright as the file's display
    matrix says; transparency is dropped and pixels are taken as stored, square or not.

    Args:
        source: the file, or where in a file it lies.
        start: seconds; earlier frames may be left out, as decoding begins at a keyframe.

    Raises:
        FrameError: not a video, or no frame in it.
        TruncatedVideoError: it breaks, or ends before the length its header promises; all that
            is readable was yielded before.
    """
    start = start or 0.0
    for margin in (*(margin for margin in _SEEK_MARGINS if start > margin), None):
        with open_video(source) as video:
            if margin is not None:
                if not video.base:
                    continue
                ticks = int((start - margin) / video.base) + (video.stream.start_time or 0)
                if video.seek(ticks) is not None:
                    continue  # not every container can
            with contextlib.closing(video.timed_frames(from_start=margin is None)) as timed:
                try:
                    first = next(timed)
                except FrameError:
                    if margin is None:
                        raise
                    continue
                if margin is not None and (first[0].pts is None or first[1] > start):
                    continue
                turn = display_matrix(first[0])
                for frame, time in itertools.chain([first], timed):
                    load = partial(frame_pixels, frame, turn)
                    yield PendingFrame(time, f"the frame at {time:g} s", load)
                return


Turn = tuple[int, int, int, int]  # (a, b, c, d) of a display matrix


def frame_pixels(frame: VideoFrame, turn: Turn) -> Tensor:
    """Convert a decoded frame to (3, H, W) uint8 RGB, upright."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return rearrange(upright(pixels, turn), "h w c -> c h w")


def display_matrix(frame: VideoFrame) -> Turn:
    """Return how a frame is to be turned, which is the same for all frames of a file."""
    # a frame asked for its side data is kept alive, with its decoder, until garbage is collected,
    # so ask a small copy, and once a file
    thumbnail = frame.reformat(width=16, height=16, format="gray")
    matrix: Any = thumbnail.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    return a, b, c, d


def upright(pixels: Tensor, turn: Turn) -> Tensor:
    """Turn and mirror (H, W, C) pixels: x' = a x + c y, y' = b x + d y, nearest quarter turn."""
    a, b, c, d = turn
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = rearrange(pixels, "h w c -> w h c")
        a, d = c, b
    return pixels.flip([axis for axis, sign in ((0, d), (1, a)) if sign < 0])


def reason(error: BaseException) -> str:
    """Return an error's text without its number and file name."""
    return str(getattr(error, "strerror", None) or error)


def pyav() -> Any:
    """Import PyAV, or say which extra brings it."""
    return imports.require("av", extra="video", purpose="reading video files")


def _url(source: VideoSource) -> str:
    # the prefix keeps a colon in a file's name from reading as a protocol
    if isinstance(source, Path):
        return f"file:{source}"
    end = source.start + source.size
    return f"subfile,,start,{source.start},end,{end},,:file:{source.path}"
