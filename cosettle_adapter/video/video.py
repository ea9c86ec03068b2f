"""Video files, decoded frame by frame with PyAV (extra ``video``)."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.completeness import Completeness
from cosettle_adapter.video.streams import (
    VideoSource,
    display_matrix,
    frame_pixels,
    open_stream,
    reason,
    upright,
)
from cosettle_adapter.video.timeline import PendingFrame

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

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


def video_info(path: VideoSource) -> VideoInfo:
    """Read a video file's header, and its first frame, which knows how it is turned.

    Raises:
        FrameError: not a video, or nothing in it can be decoded.
    """
    with open_stream(path) as (container, stream):
        fps = float(stream.average_rate) if stream.average_rate else None
        seconds = Completeness(container, stream).seconds
        frames = stream.frames or (round(seconds * fps) if seconds and fps else None)
        with contextlib.closing(_timed_frames(path, container, stream)) as timed:
            first, _ = next(timed)
            turn = display_matrix(first)
        height, width = upright(torch.empty(first.height, first.width, 0), turn).shape[:2]
    return VideoInfo(frames, height, width, fps)


def check_video(path: VideoSource) -> None:
    """Raise unless ``path`` is a video file with a stream that can be decoded.

    Raises:
        FrameError: it is not.
    """
    with open_stream(path):
        pass


def decode_video(
    path: VideoSource, start: float | None = None
) -> Generator[PendingFrame, None, None]:
    """Yield the frames of a video file with their presentation times.

    Times are seconds from the start of the stream, as the file has them: frames need not be
    evenly spaced. Pixels become 8-bit RGB whatever the format, upright as the file's display
    matrix says; transparency is dropped and pixels are taken as stored, square or not.

    Args:
        path: the file, or where in a file it lies.
        start: seconds; earlier frames may be left out, as decoding begins at a keyframe.

    Raises:
        FrameError: not a video, or no frame in it.
        TruncatedVideoError: it breaks, or ends before the length its header promises; all that
            is readable was yielded before.
    """
    start = start or 0.0
    origins = [start - margin for margin in _SEEK_MARGINS if start > margin]
    for origin in (*origins, None):
        with open_stream(path) as (container, stream):
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
                turn = display_matrix(first[0])
                for frame, time in itertools.chain([first], timed):
                    load = partial(frame_pixels, frame, turn)
                    yield PendingFrame(time, f"the frame at {time:g} s", load)
                return


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
    path: VideoSource, container: InputContainer, stream: VideoStream, *, from_start: bool = True
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
            f"{path} breaks off ({reason(error)}): {completeness.promise(from_start=from_start)}",
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
