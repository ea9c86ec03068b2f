"""Given frames of a video, each decoded from the keyframe before it."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
from array import array
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.decoder import (
    Turn,
    Video,
    VideoSource,
    display_matrix,
    frame_pixels,
    open_video,
    pyav,
    reason,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

# Larger files are not read through for their times, which then come from the header alone.
SCAN_LIMIT = 256 << 20  # bytes
_STEP_BACK = 8  # seconds, where keyframes are unknown
# A header may promise frames that are not there; the last frame stands for those this near.
_TAIL_SECONDS = 0.5
# How many keyframes before the nearest one decoding begins, in turn; then at the file's start.
_ATTEMPTS = (0, 1, None)


class _Unreachable(Exception):  # noqa: N818  # an outcome of an attempt, never seen outside
    """A frame that this attempt does not reach; another one may."""


class _Index(NamedTuple):
    """Where a video's frames and keyframes are, in increasing order.

    A place is a presentation time in ticks or, where the file holds none or those of other frames
    (not ``timed``), a position counted from 0. ``tolerance`` is by how many ticks places may be off
    that were made up from the header, less than half the step between two; None for the file's own.
    """

    places: Sequence[int]
    keys: Sequence[int] = ()  # empty if unknown
    key_times: Sequence[int] = ()  # what to seek to for each of ``keys``
    second: int = 1  # in ticks
    timed: bool = True
    tolerance: int | None = None

    def keyframe_before(self, place: int, back: int) -> tuple[int, int]:
        """Where to begin decoding for a frame, ``back`` keyframes early: place, time to seek to."""
        if not self.keys:
            time = place - back * _STEP_BACK * self.second
            return time, time
        number = max(0, bisect.bisect_right(self.keys, place) - 1 - back)
        return self.keys[number], self.key_times[number]


def count_frames(source: VideoSource) -> int:
    """Count the frames of a video without decoding them.

    Raises:
        FrameError: not a video, or one without frames.
        TruncatedVideoError: it ends before the length its header promises.
    """
    return len(_index(source).places)


def read_frames(source: VideoSource, indices: Sequence[int]) -> Tensor:
    """Decode given frames of a video and as few others as possible.

    Frame ``i`` is the one that decoding the whole file would deliver at position ``i``, also where
    frames are coded out of order or unevenly spaced. One thread decodes from the keyframe before
    each frame, or from the start of files without times. In files above :data:`SCAN_LIMIT` bytes
    frames are taken to be evenly spaced.

    Args:
        source: a file, or where in a file it lies.
        indices: 0-based, in any order, repeated or not; at least one.

    Returns:
        (T, 3, H, W) uint8, upright, in the order of ``indices``.

    Raises:
        FrameError: not a video, no such frame, or a frame that cannot be decoded undamaged.
        TruncatedVideoError: it ends before the length its header promises.
    """
    index = _index(source)
    if not indices:
        raise FrameError(f"no frames of {source} were asked for; give at least one index")
    last = len(index.places) - 1
    outside = [number for number in indices if not 0 <= number <= last]
    if outside:
        raise FrameError(f"{source} has frames 0 to {last}, got index {outside[0]}")
    found = _find(source, index, sorted(set(indices)))
    frames = [found[number] for number in indices]
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({f"{frame.shape[-2]} x {frame.shape[-1]}" for frame in frames})
        raise FrameError(f"the frames of {source} are of several sizes: {', '.join(sizes)}")
    return torch.stack(frames)


def _find(source: VideoSource, index: _Index, numbers: list[int]) -> dict[int, Tensor]:
    problem = ""
    for back in _ATTEMPTS if index.timed or index.keys else (None,):
        try:
            with (
                open_video(source, threads=False) as video,
                contextlib.closing(_walk(video, index, numbers, back)) as walk,
            ):
                return dict(walk)
        except _Unreachable as missing:
            problem = str(missing)
        except (pyav().error.FFmpegError, OSError) as error:
            problem = f"it breaks off ({reason(error)})"
    raise FrameError(f"{source} cannot be decoded where it should: {problem}")


def _walk(
    video: Video, index: _Index, numbers: list[int], back: int | None
) -> Generator[tuple[int, Tensor], None, None]:
    """Yield frames by increasing number, decoding on or from a later keyframe."""
    tolerance = index.tolerance or 0
    wanted = None if back is None else {index.places[number] for number in numbers}
    decoded: Generator[tuple[int, VideoFrame], None, None] | None = None
    latest: tuple[int, VideoFrame] | None = None
    turn: Turn | None = None
    for number in numbers:
        place = index.places[number]
        if latest is None or latest[0] < place - tolerance:
            key = None if back is None else index.keyframe_before(place, back)
            here = index.places[0] if latest is None else latest[0]
            if key is not None and not here < key[0] <= place:
                key = None  # decoding on from here is shorter
            if decoded is not None and key is not None:
                decoded.close()
                decoded = latest = None
            decoded = decoded or _placed(video, index, key, wanted)
            first = True
            for latest in decoded:
                if latest[0] >= place - tolerance:
                    break
                first = False
            else:
                tail = int(_TAIL_SECONDS * index.second)
                if index.tolerance is None or latest is None or latest[0] < place - tail:
                    raise _Unreachable(f"decoding ends before frame {number}")
            if key is not None and first and latest[0] > place + tolerance:
                raise _Unreachable(f"no keyframe leads to frame {number}")
        if latest[1].is_corrupt:
            raise _Unreachable(f"frame {number} is damaged")
        turn = turn or display_matrix(latest[1])
        yield number, frame_pixels(latest[1], turn)


def _placed(
    video: Video, index: _Index, key: tuple[int, int] | None, wanted: set[int] | None
) -> Generator[tuple[int, VideoFrame], None, None]:
    """Decode to frames and their places from a keyframe (its place, its time), or on from here.

    Frames at other places than ``wanted`` are left out where no frame refers to them.
    """
    codec = video.stream.codec_context
    needed = wanted if index.timed and index.tolerance is None else None

    def spare(packet: Packet[Any]) -> None:
        needless = needed is not None and packet.pts is not None and packet.pts not in needed
        codec.skip_frame = "NONREF" if needless else "DEFAULT"

    if key is not None and (problem := video.seek(key[1])):
        raise _Unreachable(f"seeking fails ({problem})")
    for count, frame in enumerate(video.frames(spare)):
        if index.timed:
            if frame.pts is not None:
                yield frame.pts, frame
        elif key is not None and not count and frame.pts != key[1]:
            raise _Unreachable("seeking leads elsewhere")
        else:
            yield (key[0] if key else 0) + count, frame


def _index(source: VideoSource) -> _Index:
    """Find a video's frames in its packets, a hundred times faster than decoding them.

    The latest results are kept.
    """
    path = source if isinstance(source, Path) else source.path
    try:
        status = path.stat()
    except OSError as error:
        raise FrameError(f"{source} cannot be read ({reason(error)})") from error
    if isinstance(source, Path):
        return _read_index(source, status.st_mtime_ns, status.st_size)
    if source.start + source.size > status.st_size:
        raise TruncatedVideoError(
            f"{source} ends early: {path.name} ends before it does", frames_read=0
        )
    return _read_index(source, status.st_mtime_ns, source.size)


@functools.lru_cache(maxsize=256)
def _read_index(source: VideoSource, modified: int, size: int) -> _Index:
    del modified  # a file that changed is another key of the cache
    with open_video(source, threads=False) as video:
        return (_from_header(video) if size > SCAN_LIMIT else None) or _from_packets(video)


def _from_header(video: Video) -> _Index | None:
    """Take frames to be evenly spaced, as many as the header promises."""
    if not video.base or not video.step:
        return None
    seconds = video.completeness.seconds or 0
    start, step = video.stream.start_time or 0, video.step / video.base
    count = video.stream.frames or round(seconds / video.step)
    places = array("q", (start + round(number * step) for number in range(count)))
    tolerance = max(0, math.ceil(step / 2) - 1)
    return _Index(places, second=round(1 / video.base), tolerance=tolerance) if count else None


def _from_packets(video: Video) -> _Index:
    try:
        packets = [
            (packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
            for packet in video.packets()
            if packet.size
        ]
    except (pyav().error.FFmpegError, OSError) as error:
        raise TruncatedVideoError(
            f"{video.source} breaks off ({reason(error)})", frames_read=0
        ) from error
    # a recording may begin between keyframes, and what an edit list cuts away is not shown
    first_key = next((place for place, packet in enumerate(packets) if packet[2]), 0)
    shown = [packet for packet in packets[first_key:] if not packet[3]]
    if not shown:
        raise FrameError(f"{video.source} has a video stream, but no frame in it")
    times = array("q", [time for time, *_ in shown if time is not None])
    timed = len(times) == len(shown)
    if timed:
        origin = min(times) if video.stream.start_time is None else video.stream.start_time
        for time, lasts in sorted(zip(times, (packet[1] for packet in shown), strict=True)):
            seconds = float((time - origin) * video.base)
            video.completeness.saw_frame(seconds, float(lasts * video.base or video.step))
    else:
        for number in range(len(shown)):
            video.completeness.saw_frame(float(number * video.step), float(video.step))
    video.completeness.check(video.source, len(shown), from_start=True)
    if not timed:
        return _Index(range(len(shown)), timed=False)
    second = round(1 / video.base) if video.base else 1
    keys = array("q", [place for place, packet in enumerate(shown) if packet[2]])
    key_times = array("q", [times[place] for place in keys])
    in_order = all(earlier < later for earlier, later in itertools.pairwise(times))
    if in_order and getattr(video.stream.codec_context, "has_b_frames", False):
        # frames are coded in another order than they are shown in, and times do not say which
        return _Index(range(len(shown)), keys, key_times, second, timed=False)
    key_times = array("q", sorted(key_times))
    return _Index(array("q", sorted(set(times))), key_times, key_times, second)
