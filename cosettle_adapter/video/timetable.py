"""When each frame of a video is shown, read from its packets without decoding one."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.video.completeness import Completeness
from cosettle_adapter.video.streams import VideoSource, open_stream, reason

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Larger files are not read through for their times, which then come from the header alone.
SCAN_LIMIT = 256 << 20  # bytes
_CACHED = 256
_STEP_BACK = 8  # seconds, where keyframes are unknown


@dataclass(frozen=True)
class Timetable:
    """The places of a video's frames, in order.

    A place is a presentation time in ticks of the stream's time base. Where the file holds none,
    or those of other frames, it is a position, counted from 0.

    Attributes:
        places: one a frame, increasing.
        keys: places of keyframes, increasing; empty if unknown.
        second: ticks in a second.
        kind: whether places are the file's ``times``, ``estimated`` ones made up from the header,
            or ``positions``.
        tolerance: ticks by which estimated times may be off, less than half the step between two.
        key_times: what to seek to for each of ``keys``, where places are positions.
    """

    places: Sequence[int]
    keys: Sequence[int]
    second: int
    kind: Literal["times", "estimated", "positions"] = "times"
    tolerance: int = 0
    key_times: Sequence[int] = ()

    @property
    def seekable(self) -> bool:
        """Whether decoding may begin elsewhere than at the start."""
        return self.kind != "positions" or bool(self.key_times)

    def keyframe_before(self, place: int, back: int = 0) -> tuple[int, int]:
        """Return where to begin decoding for a frame: the place, and the time to seek to.

        Args:
            place: of the frame.
            back: how many keyframes before the nearest one.
        """
        if not self.keys:
            time = place - back * _STEP_BACK * self.second
            return time, time
        index = max(0, bisect.bisect_right(self.keys, place) - 1 - back)
        return self.keys[index], (self.key_times or self.keys)[index]


def read_timetable(source: VideoSource) -> Timetable:
    """Find out how many frames a video has and when each is shown.

    Every packet is looked at and none decoded, which takes about a hundredth of the time that
    decoding takes. Files above :data:`SCAN_LIMIT` are not read through: the header says how many
    frames there are, and they are taken to be evenly spaced. The latest results are kept.

    Raises:
        FrameError: not a video, or one without frames.
        TruncatedVideoError: it ends before the length its header promises.
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
    return _read(source, status.st_mtime_ns, size)


@functools.lru_cache(maxsize=_CACHED)
def _read(source: VideoSource, modified: int, size: int) -> Timetable:
    del modified  # a file that changed is another key of the cache
    with open_stream(source) as (container, stream):
        table = _from_header(container, stream) if size > SCAN_LIMIT else None
        return table or _from_packets(source, container, stream)


def _from_header(container: InputContainer, stream: VideoStream) -> Timetable | None:
    promised = Completeness(container, stream)
    rate, base = stream.average_rate, stream.time_base
    if not rate or not base:
        return None
    count = stream.frames or round((promised.seconds or 0) * rate)
    if not count:
        return None
    step = 1 / (rate * base)
    times = _EvenTimes(stream.start_time or 0, step, count)
    tolerance = max(0, math.ceil(step / 2) - 1)
    return Timetable(times, (), round(1 / base), "estimated", tolerance)


def _from_packets(source: VideoSource, container: InputContainer, stream: VideoStream) -> Timetable:
    av = extras.require("av", extra="video", purpose="reading video files")
    completeness = Completeness(container, stream)
    packets: list[_Packet] = []
    last_is_cut = False
    try:
        for packet in container.demux(completeness.streams):
            if packet.stream.index != stream.index:
                completeness.saw_packet(packet)
            elif packet.size:
                packets.append(
                    _Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
                )
                last_is_cut = packet.is_corrupt
    except (av.error.FFmpegError, OSError) as error:
        raise TruncatedVideoError(
            f"{source} breaks off ({reason(error)})", frames_read=len(packets)
        ) from error
    completeness.partial_tail = last_is_cut and "mpegts" not in container.format.name
    # a recording may begin between keyframes
    first_key = next((place for place, packet in enumerate(packets) if packet.is_key), 0)
    # and what an edit list cuts away is decoded and not shown
    shown = [packet for packet in packets[first_key:] if not packet.is_cut]
    if not shown:
        raise FrameError(f"{source} has a video stream, but no frame in it")
    _check_length(source, stream, completeness, shown)
    second = round(1 / stream.time_base) if stream.time_base else 1
    times = array("q", [packet.time for packet in shown if packet.time is not None])
    if len(times) < len(shown):
        return Timetable(range(len(shown)), (), second, "positions")
    in_order = all(earlier < later for earlier, later in itertools.pairwise(times))
    keys = [place for place, packet in enumerate(shown) if packet.is_key]
    key_times = array("q", [times[place] for place in keys])
    if in_order and getattr(stream.codec_context, "has_b_frames", False):
        # frames are coded in another order than they are shown in, and times do not say which
        return Timetable(
            range(len(shown)), array("q", keys), second, "positions", key_times=key_times
        )
    return Timetable(array("q", sorted(set(times))), array("q", sorted(key_times)), second)


def _check_length(
    source: VideoSource,
    stream: VideoStream,
    completeness: Completeness,
    shown: list[_Packet],
) -> None:
    """Raise if the packets end before the header says."""
    base = stream.time_base or Fraction(0)
    step = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    timed = sorted((each.time, each.lasts) for each in shown if each.time is not None)
    if len(timed) == len(shown):
        origin = timed[0][0] if stream.start_time is None else stream.start_time
        for time, lasts in timed:
            completeness.saw_frame(float((time - origin) * base), float(lasts * base or step))
    else:
        for index in range(len(shown)):
            completeness.saw_frame(float(index * step), float(step))
    missing = completeness.shortfall(from_start=True)
    if missing is not None:
        raise TruncatedVideoError(f"{source} ends early: {missing}", frames_read=len(shown))


class _Packet(NamedTuple):
    time: int | None
    lasts: int
    is_key: bool
    is_cut: bool


@dataclass(frozen=True)
class _EvenTimes(Sequence[int]):
    """The times of evenly spaced frames, without a list of them."""

    start: int
    step: Fraction
    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.length))]
        return self.start + round(range(self.length)[index] * self.step)
