"""Given frames of a video, each decoded from the keyframe before it.

An index of the file's frames is read from its packets, without decoding one. It says for each frame
its place: its presentation time in ticks of the stream's time base or, where the file holds none or
those of other frames, its position, counted from 0.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.decoder import (
    Turn,
    Video,
    VideoSource,
    display_matrix,
    frame_pixels,
    open_video,
    reason,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

# Larger files are not read through for their times, which then come from the header alone.
SCAN_LIMIT = 256 << 20  # bytes
_CACHED = 256
_STEP_BACK = 8  # seconds, where keyframes are unknown
# A header may promise frames that are not there; the last frame stands for those this near.
_TAIL_SECONDS = 0.5
# How many keyframes before the nearest one decoding begins, in turn; then at the file's start.
_ATTEMPTS = (0, 1, None)


class _Unreachable(Exception):  # noqa: N818  # an outcome of an attempt, never seen outside
    """A frame that this attempt does not reach; another one may."""


@dataclass(frozen=True)
class _Index:
    """The places of a video's frames and keyframes, increasing.

    Attributes:
        places: one a frame.
        keys: places of keyframes; empty if unknown.
        key_times: what to seek to for each of ``keys``; empty if that leads nowhere.
        second: ticks in a second.
        timed: places are times, not positions.
        tolerance: ticks by which times that were made up from the header may be off, less than
            half the step between two; None for the file's own.
    """

    places: Sequence[int]
    keys: Sequence[int]
    key_times: Sequence[int]
    second: int
    timed: bool = True
    tolerance: int | None = None

    @property
    def seekable(self) -> bool:
        return self.timed or bool(self.key_times)

    def keyframe_before(self, place: int, back: int) -> tuple[int, int]:
        """Where to begin decoding for a frame, ``back`` keyframes early: place, time to seek to."""
        if not self.keys:
            time = place - back * _STEP_BACK * self.second
            return time, time
        index = max(0, bisect.bisect_right(self.keys, place) - 1 - back)
        return self.keys[index], self.key_times[index]

    def told(self, place: int) -> str:
        return f"{(place - self.places[0]) / self.second:g} s" if self.timed else f"frame {place}"


def count_frames(source: VideoSource) -> int:
    """Count the frames of a video without decoding them.

    Raises:
        FrameError: not a video, or one without frames.
        TruncatedVideoError: it ends before the length its header promises.
    """
    return len(_index(source).places)


def read_frames(source: VideoSource, indices: Sequence[int]) -> Tensor:
    """Decode given frames of a video and as few others as possible.

    Frame ``i`` is the one that decoding the whole file would deliver at position ``i``, also
    where frames are coded out of order or unevenly spaced. The cost is that of decoding from the
    keyframe before each frame, in one thread; frames that no other one refers to are left out.
    In files without times, decoding begins at the start; in files whose times are in coding order,
    frames are counted from a keyframe. In files above :data:`SCAN_LIMIT` bytes frame ``i`` is the
    one shown at ``i`` times the average distance between frames, which is the same if they are
    evenly spaced.

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
    wanted = [index.places[number] for number in indices]
    found = _find(source, index, sorted(set(wanted)))
    frames = [found[place] for place in wanted]
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({f"{frame.shape[-2]} x {frame.shape[-1]}" for frame in frames})
        raise FrameError(f"the frames of {source} are of several sizes: {', '.join(sizes)}")
    return torch.stack(frames)


def _find(source: VideoSource, index: _Index, wanted: list[int]) -> dict[int, Tensor]:
    av = extras.require("av", extra="video", purpose="reading video files")
    problem = ""
    for back in _ATTEMPTS if index.seekable else (None,):
        try:
            with (
                open_video(source, threads=False) as video,
                contextlib.closing(_walk(video, index, wanted, back)) as walk,
            ):
                return dict(walk)
        except _Unreachable as missing:
            problem = str(missing)
        except (av.error.FFmpegError, OSError) as error:
            problem = f"it breaks off ({reason(error)})"
    raise FrameError(f"{source} cannot be decoded where it should: {problem}")


def _walk(
    video: Video, index: _Index, wanted: list[int], back: int | None
) -> Generator[tuple[int, Tensor], None, None]:
    """Yield the frames at ``wanted`` places, which increase."""
    tolerance = index.tolerance or 0
    decoded: Generator[tuple[int, VideoFrame], None, None] | None = None
    latest: tuple[int, VideoFrame] | None = None
    turn: Turn | None = None
    for place in wanted:
        if latest is None or latest[0] < place - tolerance:
            key = None if back is None else index.keyframe_before(place, back)
            here = index.places[0] if latest is None else latest[0]
            if key is not None and not here < key[0] <= place:
                key = None  # decoding on from here is shorter
            if decoded is not None and key is not None:
                decoded.close()
                decoded = latest = None
            if decoded is None:
                decoded = _placed(video, index, key, wanted if back is not None else None)
            passed = 0
            for latest in decoded:
                if latest[0] >= place - tolerance:
                    break
                passed += 1
            else:
                tail = int(_TAIL_SECONDS * index.second)
                if index.tolerance is None or latest is None or latest[0] < place - tail:
                    raise _Unreachable(f"decoding ends before the frame at {index.told(place)}")
            if key is not None and not passed and latest[0] > place + tolerance:
                raise _Unreachable(f"no keyframe leads to {index.told(place)}")
        frame = latest[1]
        if frame.is_corrupt:
            raise _Unreachable(f"the frame at {index.told(place)} is damaged")
        turn = turn or display_matrix(frame)
        yield place, frame_pixels(frame, turn)


def _placed(
    video: Video, index: _Index, key: tuple[int, int] | None, wanted: list[int] | None
) -> Generator[tuple[int, VideoFrame], None, None]:
    """Decode from a keyframe, or on from here, to frames and their places.

    Args:
        key: its place, and the time to seek to.
        wanted: places; frames elsewhere that no other one refers to are left out. None for all.
    """
    codec = video.stream.codec_context
    sparing = index.timed and index.tolerance is None and wanted is not None
    needed = frozenset(wanted or ())

    def spare(packet: Packet[Any]) -> None:
        needless = sparing and packet.pts is not None and packet.pts not in needed
        codec.skip_frame = "NONREF" if needless else "DEFAULT"

    if key is not None and (problem := video.seek(key[1])):
        raise _Unreachable(f"seeking fails ({problem})")
    for count, frame in enumerate(video.frames(spare)):
        if index.timed:
            if frame.pts is not None:
                yield frame.pts, frame
        elif key is None:
            yield count, frame
        elif not count and frame.pts != key[1]:
            raise _Unreachable("seeking leads elsewhere")
        else:
            yield key[0] + count, frame


def _index(source: VideoSource) -> _Index:
    """Find out where a video's frames are; the latest results are kept.

    Every packet is looked at and none decoded, which takes about a hundredth of the time that
    decoding takes.
    """
    path = source if isinstance(source, Path) else source.path
    try:
        status = path.stat()
    except OSError as error:
        raise FrameError(f"{source} cannot be read ({reason(error)})") from error
    size = status.st_size if isinstance(source, Path) else source.size
    if not isinstance(source, Path) and source.start + size > status.st_size:
        raise TruncatedVideoError(
            f"{source} ends early: {path.name} ends before it does", frames_read=0
        )
    return _read_index(source, status.st_mtime_ns, size)


@functools.lru_cache(maxsize=_CACHED)
def _read_index(source: VideoSource, modified: int, size: int) -> _Index:
    del modified  # a file that changed is another key of the cache
    with open_video(source, threads=False) as video:
        return (_from_header(video) if size > SCAN_LIMIT else None) or _from_packets(video)


def _from_header(video: Video) -> _Index | None:
    """Take frames to be evenly spaced, as many as the header promises."""
    if not video.base or not video.step:
        return None
    seconds = video.completeness.seconds or 0
    count = video.stream.frames or round(seconds / video.step)
    if not count:
        return None
    start, step = video.stream.start_time or 0, video.step / video.base
    places = array("q", (start + round(number * step) for number in range(count)))
    tolerance = max(0, math.ceil(step / 2) - 1)
    return _Index(places, (), (), round(1 / video.base), tolerance=tolerance)


def _from_packets(video: Video) -> _Index:
    av = extras.require("av", extra="video", purpose="reading video files")
    packets: list[tuple[int | None, int, bool, bool]] = []
    try:
        for packet in video.packets():
            if packet.size:
                lasts, cut_away = packet.duration or 0, packet.is_discard
                packets.append((packet.pts, lasts, packet.is_keyframe, cut_away))
    except (av.error.FFmpegError, OSError) as error:
        raise TruncatedVideoError(
            f"{video.source} breaks off ({reason(error)})", frames_read=len(packets)
        ) from error
    # a recording may begin between keyframes
    first_key = next((place for place, packet in enumerate(packets) if packet[2]), 0)
    # and what an edit list cuts away is decoded and not shown
    shown = [packet for packet in packets[first_key:] if not packet[3]]
    if not shown:
        raise FrameError(f"{video.source} has a video stream, but no frame in it")
    times = array("q", [time for time, *_ in shown if time is not None])
    timed = len(times) == len(shown)
    if timed:
        origin = min(times) if video.stream.start_time is None else video.stream.start_time
        for time, lasts in sorted((time or 0, lasts) for time, lasts, *_ in shown):
            seconds = float((time - origin) * video.base)
            video.completeness.saw_frame(seconds, float(lasts * video.base or video.step))
    else:
        for number in range(len(shown)):
            video.completeness.saw_frame(float(number * video.step), float(video.step))
    video.completeness.check(video.source, len(shown), from_start=True)
    second = round(1 / video.base) if video.base else 1
    if not timed:
        return _Index(range(len(shown)), (), (), second, timed=False)
    keys = array("q", [place for place, packet in enumerate(shown) if packet[2]])
    key_times = array("q", [times[place] for place in keys])
    in_order = all(earlier < later for earlier, later in itertools.pairwise(times))
    if in_order and getattr(video.stream.codec_context, "has_b_frames", False):
        # frames are coded in another order than they are shown in, and times do not say which
        return _Index(range(len(shown)), keys, key_times, second, timed=False)
    key_times = array("q", sorted(key_times))
    return _Index(array("q", sorted(set(times))), key_times, key_times, second)
