"""Video files, decoded frame by frame with PyAV (extra ``video``)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.frames.completeness import Completeness
from cosettle_adapter.frames.timeline import PendingFrame

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# (a, b, c, d) of a display matrix
Turn = tuple[int, int, int, int]

logger = logging.getLogger(__name__)

# FFmpeg takes any text for a film of characters
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")
_ATTACHED_PICTURE = 0x0400  # AV_DISPOSITION_ATTACHED_PIC: the cover of a song
_LOADERS = {".npy": "numpy.load", ".npz": "numpy.load", ".pt": "torch.load", ".pth": "torch.load"}
# how far before ``start`` to look for a keyframe, in turn, until one is found in time
_SEEK_MARGINS = (0.0, 2.0, 16.0)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        frames: number of frames the header promises, or None; may be a little off.
        height: height of the frames as they are delivered, upright.
        width: width of the frames as they are delivered, upright.
        fps: average frames per second, or None.
    """

    frames: int | None
    height: int
    width: int
    fps: float | None


def video_info(path: Path) -> VideoInfo:
    """Read a video file's header, and its first frame, which knows how it is turned.

    Raises:
        FrameError: not a video, or nothing in it can be decoded.
    """
    with _opened(path) as (container, stream):
        fps = float(stream.average_rate) if stream.average_rate else None
        seconds = Completeness(container, stream).seconds
        frames = stream.frames or (round(seconds * fps) if seconds and fps else None)
        with contextlib.closing(_timed_frames(path, container, stream)) as timed:
            first, _ = next(timed)
            turn = _display_matrix(first)
        height, width = _upright(torch.empty(first.height, first.width, 0), turn).shape[:2]
    return VideoInfo(frames, height, width, fps)


def check_video(path: Path) -> None:
    """Raise unless ``path`` is a video file with a stream that can be decoded.

    Raises:
        FrameError: it is not.
    """
    with _opened(path):
        pass


def decode_video(path: Path, start: float | None = None) -> Generator[PendingFrame, None, None]:
    """Yield the frames of a video file with their presentation times.

    Times are seconds from the start of the stream, as the file has them: frames need not be
    evenly spaced. Pixels become 8-bit RGB whatever the format, upright as the file's display
    matrix says; transparency is dropped and pixels are taken as stored, square or not.

    Args:
        path: the file.
        start: seconds; earlier frames may be left out, as decoding begins at a keyframe.

    Raises:
        FrameError: not a video, or no frame in it.
        TruncatedVideoError: it breaks, or ends before the length its header promises; all that
            is readable was yielded before.
    """
    start = start or 0.0
    origins = [start - margin for margin in _SEEK_MARGINS if start > margin]
    for origin in (*origins, None):
        with _opened(path) as (container, stream):
            stream.thread_type = "AUTO"
            if origin is not None and not _seek(container, stream, origin):
                continue
            timed = _timed_frames(path, container, stream, from_start=origin is None)
            with contextlib.closing(timed):
                try:
                    first = next(timed)
                except FrameError:
                    if origin is None:
                        raise
                    continue
                if origin is not None and (first[0].pts is None or first[1] > start):
                    continue
                turn = _display_matrix(first[0])
                for frame, time in itertools.chain([first], timed):
                    load = partial(_pixels, frame, turn)
                    yield PendingFrame(time, f"the frame at {time:g} s", load)
                return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    purpose = "reading video files"
    av = extras.require("av", extra="video", purpose=purpose)
    extras.require("numpy", extra="video", purpose=purpose)
    hint = "it is no video, or its end, which holds the index, is missing"
    if path.suffix.lower() in _LOADERS:
        hint = f"load it with {_LOADERS[path.suffix.lower()]} and pass the frames"
    try:
        # the prefix keeps a colon in a file's name from reading as a protocol
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError(f"{path} cannot be read as a video ({_reason(error)}); {hint}") from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not int(getattr(stream, "disposition", 0) or 0) & _ATTACHED_PICTURE
        ]
        if not streams:
            kinds = ", ".join(stream.type for stream in container.streams) or "none"
            raise FrameError(f"{path} has no video stream (streams: {kinds})")
        if streams[0].codec_context is None:
            raise FrameError(f"{path} holds video that this build of FFmpeg cannot decode")
        if streams[0].codec_context.name in _TEXT_CODECS:
            raise FrameError(f"{path} cannot be read as a video (it looks like text); {hint}")
        try:
            yield container, streams[0]
        finally:
            # the decoder's threads come to rest while others may run: PyAV frees a decoder with
            # the interpreter locked, and a thread that is logging would wait for that lock
            streams[0].codec_context.flush_buffers()


def _seek(container: InputContainer, stream: VideoStream, seconds: float) -> bool:
    av = extras.require("av", extra="video", purpose="reading video files")
    if stream.time_base is None:
        return False
    target = int(seconds / stream.time_base) + (stream.start_time or 0)
    try:
        container.seek(target, stream=stream, backward=True)
    except (av.error.FFmpegError, OSError):
        return False  # not every container can
    return True


def _timed_frames(
    path: Path, container: InputContainer, stream: VideoStream, *, from_start: bool = True
) -> Generator[tuple[VideoFrame, float], None, None]:
    """Decode to the end of the file, then say whether it came too early."""
    av = extras.require("av", extra="video", purpose="reading video files")
    completeness = Completeness(container, stream)
    base = stream.time_base or Fraction(0)
    step = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    origin, time, count, damaged = stream.start_time, -step, 0, False
    try:
        for frame in _decode(container, stream, completeness):
            if frame.pts is None:
                time += step
            else:
                origin = frame.pts if origin is None else origin
                time = (frame.pts - origin) * base
            duration = (getattr(frame, "duration", 0) or 0) * base or step
            completeness.saw_frame(float(time), float(duration))
            if frame.is_corrupt and not damaged:
                damaged = True
                logger.warning("%s is damaged: the decoder patched up what it could", path)
            yield frame, float(time)
            count += 1
    except (av.error.FFmpegError, OSError) as error:
        raise TruncatedVideoError(
            f"{path} breaks off ({_reason(error)}): {completeness.promise(from_start=from_start)}",
            frames_read=count,
        ) from error
    missing = completeness.shortfall(from_start=from_start)
    if missing is not None:
        raise TruncatedVideoError(f"{path} ends early: {missing}", frames_read=count)
    if not count:
        raise FrameError(f"{path} has a video stream, but no frame of it can be decoded")


def _decode(
    container: InputContainer, stream: VideoStream, completeness: Completeness
) -> Iterator[VideoFrame]:
    av = extras.require("av", extra="video", purpose="reading video files")
    # a transport stream may be cut anywhere
    whole = "mpegts" not in container.format.name
    started = False
    held: Packet[Any] | None = None
    for packet in container.demux(completeness.streams):
        if packet.stream.index != stream.index:  # the last packets have no stream_index
            completeness.saw_packet(packet)
            continue
        at_end = not packet.size and packet.dts is None
        if at_end and held is not None and whole:
            completeness.partial_tail, held = True, None
        ready = [p for p in (held, packet) if p is not None and (p.size or at_end)]
        held = None
        if packet.is_corrupt and packet.size:
            held = ready.pop()  # if it is the last, it is half a frame
        for complete in ready:
            try:
                frames = stream.decode(complete)
            except av.error.InvalidDataError:
                if started:
                    raise
                continue  # a recording may begin between keyframes
            started = started or bool(frames)
            yield from frames


def _pixels(frame: VideoFrame, turn: Turn) -> Tensor:
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return rearrange(_upright(pixels, turn), "h w c -> c h w")


def _display_matrix(frame: VideoFrame) -> Turn:
    # a frame asked for its side data is kept alive, with its decoder, until garbage is collected,
    # so ask a small copy, and once a file
    thumbnail = frame.reformat(width=16, height=16, format="gray")
    matrix: Any = thumbnail.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    return a, b, c, d


def _upright(pixels: Tensor, turn: Turn) -> Tensor:
    """Turn and mirror (H, W, C) pixels: x' = a x + c y, y' = b x + d y, nearest quarter turn."""
    a, b, c, d = turn
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = rearrange(pixels, "h w c -> w h c")
        a, d = c, b
    return pixels.flip([axis for axis, sign in ((0, d), (1, a)) if sign < 0])


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
