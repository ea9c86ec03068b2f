"""Read selected frames of a video, each decoded from the keyframe before it."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.decoder import Video, VideoSource, open_video, pyav, reason

if TYPE_CHECKING:
    from av.packet import Packet

# keyframes to go back before the nearest one, tried in turn; None is the start of the file
_ATTEMPTS = (0, 1, None)


class _Index(NamedTuple):
    """Presentation times of frames and keyframes in ticks, ascending.

    In files without reliable times, places are positions from 0, and there are no keyframes.
    """

    places: Sequence[int]
    keys: Sequence[int] = ()


class _Packet(NamedTuple):
    """The properties of a packet that the index needs; times in ticks."""

    is_key: bool
    is_hidden: bool
    pts: int | None
    dts: int | None
    duration: int | None


def count_frames(source: VideoSource) -> int:
    """Count the frames of a video without decoding; errors are those of :func:`read_frames`."""
    return len(_index(source).places)


def read_frames(source: VideoSource, indices: Sequence[int]) -> Tensor:
    """Decode selected frames of a video, and as few others as possible.

    Frame ``i`` is the ``i``-th of sequential decoding, even if frames are coded out of order or
    unevenly spaced. One thread decodes from the keyframe before each frame, or from the start of
    files without reliable times.

    Returns (T, 3, H, W) uint8, upright, in the order of ``indices``, which may repeat.

    Raises:
        FrameError: not a video, no such frame, or a damaged frame.
        TruncatedVideoError: the file ends before its announced duration.
    """
    index = _index(source)
    if not indices:
        raise FrameError(f"got no indices of frames of {source}; give at least one index")
    last = len(index.places) - 1
    outside = [number for number in indices if not 0 <= number <= last]
    if outside:
        raise FrameError(f"{source} has frames 0 to {last}, got index {outside[0]}")
    problem = ""
    for back in _ATTEMPTS if index.keys else (None,):

        def keyframe(number: int, back: int | None = back) -> int | None:
            """Return the keyframe to decode a frame from; None for the start of the file."""
            if back is None:
                return None
            nearest = bisect.bisect_right(index.keys, index.places[number]) - 1
            return index.keys[max(0, nearest - back)]

        decoded: dict[int, Tensor] = {}
        try:
            with open_video(source, threads=False) as video:
                for key, group in itertools.groupby(sorted(set(indices)), keyframe):
                    decoded |= _decode(video, index, key, list(group))
            frames = [decoded[number] for number in indices]
            break
        except (FrameError, pyav().error.FFmpegError, OSError) as error:
            problem = reason(error)
    else:
        raise FrameError(f"{source} cannot be decoded at the requested frames: {problem}")
    sizes = dict.fromkeys(f"{frame.shape[-2]} x {frame.shape[-1]}" for frame in frames)
    if len(sizes) > 1:
        raise FrameError(f"the frames of {source} are of several sizes: {', '.join(sizes)}")
    return torch.stack(frames)


def _decode(video: Video, index: _Index, key: int | None, numbers: list[int]) -> dict[int, Tensor]:
    """Decode frames of ascending numbers from a keyframe, or from the start of the file."""
    missing = {index.places[number]: number for number in numbers}
    frames: dict[int, Tensor] = {}
    last, codec = index.places[numbers[-1]], video.stream.codec_context

    def skip_unneeded(packet: Packet[Any]) -> None:
        """Do not decode frames that are not requested and that no other frame refers to."""
        unneeded = index.keys and packet.pts is not None and packet.pts not in missing
        codec.skip_frame = "NONREF" if unneeded else "DEFAULT"

    if key is not None:
        video.seek(key)
    with contextlib.closing(video.frames(skip_unneeded)) as decoded:
        for position, frame in enumerate(decoded):
            place = frame.pts if index.keys else position
            if place in missing:
                number = missing.pop(place)
                if frame.is_corrupt:
                    raise FrameError(f"frame {number} is damaged")
                frames[number] = video.pixels(frame)
            if not missing:
                return frames
            if place is not None and place > last:
                break
    raise FrameError(f"decoding does not reach frame {min(missing.values())}")


def _index(source: VideoSource) -> _Index:
    """Index a video by its packets, a hundred times faster than decoding it."""
    path = source if isinstance(source, Path) else source.path
    try:
        status = path.stat()
    except OSError as error:
        raise FrameError(f"{source} cannot be read ({reason(error)})") from error
    if not isinstance(source, Path) and source.start + source.size > status.st_size:
        message = f"{source} ends early: {path.name} is truncated"
        raise TruncatedVideoError(message, frames_read=0)
    return _read_index(source, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _read_index(source: VideoSource, modified: int, size: int) -> _Index:
    del modified, size  # part of the cache key: a changed file is indexed again
    with open_video(source, threads=False) as video:
        try:
            packets = [
                _Packet(
                    packet.is_keyframe, packet.is_discard, packet.pts, packet.dts, packet.duration
                )
                for packet in video.packets()
                if packet.size
            ]
        except (pyav().error.FFmpegError, OSError) as error:
            message = f"{source} breaks off ({reason(error)})"
            raise TruncatedVideoError(message, frames_read=0) from error
        # a recording may begin between keyframes, and an edit list may hide frames
        decodable = list(itertools.dropwhile(lambda packet: not packet.is_key, packets)) or packets
        shown = [packet for packet in decodable if not packet.is_hidden]
        if not shown:
            raise FrameError(f"{source} has a video stream, but no frame in it")
        ticks = [packet.pts for packet in shown if packet.pts is not None]
        timed = len(ticks) == len(shown)
        durations = [(packet.duration or 0) * video.base or video.step for packet in shown]
        times = [number * video.step for number in range(len(shown))]
        if timed:
            origin = min(ticks) if video.stream.start_time is None else video.stream.start_time
            times = [(tick - origin) * video.base for tick in ticks]
        for time, duration in sorted(zip(times, durations, strict=True)):
            video.note_frame(time, duration)
        video.check_complete(len(shown), from_start=True)
        # frames are shown in another order than they are coded in, but their times do not say so
        reordered = getattr(video.stream.codec_context, "has_b_frames", False)
        if not timed or (reordered and all(packet.pts == packet.dts for packet in shown)):
            return _Index(range(len(shown)))
        keys = sorted(tick for tick, packet in zip(ticks, shown, strict=True) if packet.is_key)
        return _Index(sorted(set(ticks)), keys or [min(ticks)])
