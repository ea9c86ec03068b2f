"""Video files, decoded frame by frame with PyAV (extra ``video``)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.extras import require

logger = logging.getLogger(__name__)

# A stream that stops this much before the length its container states is taken for truncated.
# Containers round durations and let audio outlast the picture, hence the slack.
_MISSING_SHARE = 0.1
_MISSING_SECONDS = 1.0
# Containers whose frame count is that of a sample table; others (AVI) count frames never coded.
_COUNTED = "mp4"


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a container states about its first video stream, before anything is decoded.

    Attributes:
        frames: number of frames, stated or computed from duration and rate; ``None`` if unknown.
        height: height in pixels as stored, before rotation.
        width: width in pixels as stored, before rotation.
        fps: average frames per second, or ``None``.
    """

    frames: int | None
    height: int
    width: int
    fps: float | None


def video_info(path: Path) -> VideoInfo:
    """Read the header of a video file.

    Raises:
        FrameError: not a video.
    """
    with _opened(path) as (_, stream):
        fps = float(stream.average_rate) if stream.average_rate else None
        frames = stream.frames or None
        if frames is None and fps is not None:
            seconds = _stated_seconds(stream)
            frames = round(seconds * fps) if seconds else None
        return VideoInfo(frames, stream.codec_context.height, stream.codec_context.width, fps)


def decode_video(
    path: Path, *, start: float | None = None, end: float | None = None
) -> Iterator[tuple[Tensor, float]]:
    """Yield the frames of a video file with their presentation times.

    Rotation stored in the file is applied; every pixel format becomes 8-bit RGB and transparency
    is dropped. Times are seconds from the stream's first frame, as variable-rate files have them.

    Args:
        path: the file.
        start: first second; decoding begins at the keyframe before it.
        end: second to stop before.

    Yields:
        ``(3, H, W)`` uint8 and its time.

    Raises:
        FrameError: not a video, or no frame in it.
        TruncatedVideoError: it breaks in the middle or ends before its stated length; all that
            is readable was yielded before.
    """
    av = require("av", extra="video", purpose="reading video files")
    seen = 0
    time = -1.0
    reached_end = False
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        origin = float((stream.start_time or 0) * stream.time_base)
        step = 1 / float(stream.average_rate) if stream.average_rate else 0.0
        if start:
            container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
        try:
            for frame in container.decode(stream):
                time = frame.time - origin if frame.time is not None else time + step
                seen += 1
                if end is not None and time >= end:
                    reached_end = True
                    break
                if start is None or time >= start:
                    yield _pixels(frame), time
        except av.error.FFmpegError as error:
            raise TruncatedVideoError(
                f"{path} breaks after {seen} frames ({_reason(error)}); it is truncated or damaged",
                frames_read=seen,
            ) from error
        expected = _stated_seconds(stream)
        stated = stream.frames if _COUNTED in container.format.name else 0
    if reached_end:
        return
    if not seen and not start:
        raise FrameError(f"{path} has a video stream but not a single frame could be decoded")
    complete = not stated or start or seen >= stated - max(1, _MISSING_SHARE * stated)
    if complete and expected is not None and seen:
        slack = max(_MISSING_SECONDS, _MISSING_SHARE * expected)
        complete = time + step >= expected - slack
    if not complete:
        length = f"{stated} frames" if stated else f"{expected:.1f} s"
        raise TruncatedVideoError(
            f"{path} ends after {seen} frames, though its header states {length}; it is truncated",
            frames_read=seen,
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    av = require("av", extra="video", purpose="reading video files")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError(
            f"{path} cannot be opened as a video ({_reason(error)}); it is another kind of file, "
            "or its header is missing"
        ) from error
    with container:
        if not container.streams.video:
            raise FrameError(f"{path} has no video stream")
        yield container, container.streams.video[0]


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _stated_seconds(stream: Any) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if stream.container.duration:
        return float(stream.container.duration) / 1e6
    return None


def _pixels(frame: Any) -> Tensor:
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    quarter_turns, remainder = divmod(round(getattr(frame, "rotation", 0) or 0), 90)
    if remainder:
        logger.debug("rotation of %s degrees is not a quarter turn; ignored", frame.rotation)
        quarter_turns = 0
    if quarter_turns % 4:
        pixels = torch.rot90(pixels, quarter_turns % 4, dims=(0, 1))
    return rearrange(pixels, "h w c -> c h w").contiguous()
