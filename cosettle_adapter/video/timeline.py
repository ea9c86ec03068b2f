"""When the frames of a video are shown, and which of them are missing."""

from __future__ import annotations

import bisect
import heapq
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from cosettle_adapter.video.selection import LostFrames

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_BLOCK_HEADERS = 96  # bytes between two packets of a Matroska file, at most
_ON_GRID, _OFF_GRID = Fraction(1, 20), Fraction(1, 4)  # steps
_NO_TIMESTAMPS, _MAY_RESTART = 0x0080, 0x0200  # AVFMT_NOTIMESTAMPS, AVFMT_TS_DISCONT


class Timeline:
    """Follows packets into the decoder and frames out of it.

    Times are seconds since the first frame. ``step`` is the time between frames, 0 if unknown;
    ``origin`` is the container's time of the first frame; ``damage`` is the first fault, if any.
    Only once something was damaged are frames counted as lost: elsewhere a gap is a still scene.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, fps: float | None = None
    ) -> None:
        self.container, self.stream = container, stream
        self.base = stream.time_base or Fraction(0)
        flags = int(container.format.flags)
        self.is_raw = bool(flags & _NO_TIMESTAMPS)
        # AVI and raw streams have no presentation times; those of the demuxer are guesses
        self.has_times = container.format.name != "avi" and not self.is_raw
        self.is_matroska = "matroska" in container.format.name
        self.may_restart = bool(flags & _MAY_RESTART)
        self.seekable = self.has_times and not self.may_restart
        rate = stream.average_rate if self.has_times else stream.guessed_rate
        self.step = 1 / rate if rate else Fraction(0)
        self._speed = Fraction(1)
        if fps is not None and not self.has_times:
            self._speed = 1 / Fraction(fps) / (self.step or 1)
            self.step = 1 / Fraction(fps)
        self._index: list[tuple[int, Fraction]] = []  # positions and times in an AVI file
        if container.format.name == "avi":
            entries = getattr(stream, "index_entries", ())
            speed = self.base * self._speed
            self._index = sorted((e.pos, e.timestamp * speed) for e in entries if e.size)
            if len(self._index) < stream.frames:
                self._index = []  # truncated, like the file
        self.damage = ""
        self.started = False  # whether the origin is known
        self.latest: Fraction | None = None  # time of the last frame
        self._origin: Fraction | None = None
        self._shift = Fraction(0)  # of a clock that started again
        self._waiting: list[Fraction] = []  # heap: the container's times of frames to come
        self.packets = 0
        self._uneven = False
        self._block = (0, 0)  # first byte of the last packet's block, and the one after its content
        self._end = self._widest_gap = Fraction(0)
        self._from_start = True

    @property
    def origin(self) -> Fraction:
        """The container's time of the first frame."""
        return self._origin or Fraction(0)

    @property
    def constant_rate(self) -> bool:
        """Whether frames are equally far apart, as the file says and as they were so far."""
        even = self.stream.average_rate == self.stream.base_rate
        return bool(self.step) and even and not self._uneven

    def _off_grid(self, time: Fraction) -> Fraction:
        """How far a time is from a whole number of steps, at least 1, after the last frame."""
        steps = (time - (self.latest or 0)) / self.step
        return abs(steps - max(1, round(steps)))

    def _grid_to(self, time: Fraction) -> list[Fraction]:
        """Times of frames after the last one up to a time, including missing packets."""
        latest = self.latest or Fraction(0)
        count = round((time - latest) / self.step)
        return [latest + number * self.step for number in range(1, count + 1)]

    def note(self, damage: str) -> None:
        """Note what is wrong with the file."""
        self.damage = self.damage or damage

    def jump(self) -> None:
        """Forget what was expected: decoding begins elsewhere."""
        self._from_start, self.latest, self._waiting = False, None, []
        self._block = (0, 0)

    def skipped(self, packet: Packet[Any]) -> None:
        """Note where a demuxer skipped bytes of a file whose packets follow one another."""
        if not self.is_matroska or packet.pos is None or not packet.size:
            return
        block, end = self._block
        if packet.pos == block:  # several packets of sound share a block
            self._block = (block, end + packet.size)
            return
        if block and packet.pos - end > _BLOCK_HEADERS:
            self.note("the demuxer skipped damaged bytes")
        self._block = (packet.pos, packet.pos + packet.size)

    def expect(self, packet: Packet[Any]) -> Fraction | None:
        """Note a packet before it is decoded; return the time that its frame will take up."""
        if not packet.size:
            return None
        if packet.is_corrupt:
            self.note("a packet is damaged")
        time: Fraction | None = None
        if not self.has_times:  # packets are equally far apart, but not in the order of showing
            time = self.packets * self.step
            if packet.dts is not None:
                time = packet.dts * self.base * self._speed
            if self._index and packet.pos is not None:
                # a demuxer counts past lost chunks; the index gives their true positions
                place = bisect.bisect_right(self._index, packet.pos, key=lambda entry: entry[0])
                time = self._index[max(0, place - 1)][1]
            self._origin = Fraction(0)
        elif packet.pts is not None and not packet.is_discard:
            time = packet.pts * self.base
            if self._origin is None and packet.is_keyframe:
                self._origin = time
        self.packets += 1
        if time is not None:
            heapq.heappush(self._waiting, time)
        return time

    def undecoded(self, time: Fraction | None) -> Iterator[LostFrames]:
        """Report a packet without presentation time that cannot be decoded."""
        if time is not None and not self.has_times:
            self._waiting.remove(time)
            if not self._index:
                yield from self._lost([time])

    def time_of(self, frame: VideoFrame, following: VideoFrame | None) -> Fraction | None:
        """Return the time at which a frame is shown, ``None`` if it is out of order.

        It is the container's presentation time, unless the frame before and ``following`` disagree
        with it. Without such times, the n-th shown frame takes the n-th of its packets' times.
        """
        after = Fraction(0) if self.latest is None else self.latest + self.step
        if not self.has_times:
            time = heapq.heappop(self._waiting) if self._waiting else after
            return time if self.latest is None or time > self.latest else None
        if frame.pts is None:
            return after
        if self._origin is None or (self.latest is None and self._from_start):
            time = frame.pts * self.base
            self._origin = time if self._origin is None else min(self._origin, time)
        time = self._since_origin(frame.pts)
        if self.latest is None:
            return time
        if following is not None and following.pts is not None:
            then = self._since_origin(following.pts)
            if self.latest < then and not self._fits(time, then):
                # a piece of a damaged frame has no place of its own
                no_room = self._keeps_step and after > then - self.step / 2
                return None if no_room else min(after, (self.latest + then) / 2)
        if time >= self.latest:
            return time
        decoded = self._since_origin(frame.dts or 0)
        if decoded > self.latest:
            return decoded  # the time of its presentation is damaged
        if self.damage and self.seekable:
            return None  # out of order by damage, and counted as lost before
        self._shift += after - time  # the clock started again
        return after

    def _since_origin(self, ticks: int) -> Fraction:
        """Convert a container's time to seconds since the first frame."""
        return ticks * self.base + self._shift - self.origin

    @property
    def _keeps_step(self) -> bool:
        """Whether a frame is expected at every step, though some may be damaged."""
        return bool(self.damage or self.may_restart) and self.constant_rate

    def _fits(self, time: Fraction, then: Fraction) -> bool:
        """Whether a time lies between those of the last and the next frame, on their grid."""
        if not (self.latest or 0) < time < then:
            return False
        on_grid = self._keeps_step and self._off_grid(then) < _ON_GRID
        return not on_grid or self._off_grid(time) < _OFF_GRID

    def advance(self, shown: Fraction, frame: VideoFrame) -> None:
        """Note that a frame was shown."""
        lasts = (getattr(frame, "duration", 0) or 0) * self.base or self.step
        if self.latest is not None and not self.damage and self.constant_rate:
            self._uneven = self._off_grid(shown) > _OFF_GRID
        if self.latest is not None:
            self._widest_gap = max(self._widest_gap, shown - self.latest)
        self.latest, self._end = shown, max(self._end, shown + lasts)
        self.started = True

    def lost_before(self, shown: Fraction) -> Iterator[LostFrames]:
        """Report the frames that are missing before this one."""
        if not self.has_times:
            first = Fraction(-1) if self.latest is None else self.latest
            yield from self._lost([time for _, time in self._index if first < time < shown])
            return
        expected: list[Fraction] = []
        while self._waiting and self._waiting[0] + self._shift - self.origin <= shown:
            expected.append(heapq.heappop(self._waiting) + self._shift - self.origin)
        # a broadcast has no still scenes: a gap in it is a loss whatever the reason
        if not self.damage and not (self.may_restart and self.constant_rate):
            return
        if self.constant_rate and self.latest is not None:
            expected = self._grid_to(shown)[:-1]
        first = Fraction(-1) if self.latest is None else self.latest
        yield from self._lost([time for time in expected if first < time < shown])

    def lost_at_end(self) -> Iterator[LostFrames]:
        """Report the frames that the header announces after the last one.

        By the number of packets if the header has it, else by the duration. As containers round and
        encoders drop last frames, half a second may be missing, but no more than a tenth of a short
        clip, and at least twice the widest gap between frames (a still scene at the end).
        """
        if self.latest is None:
            return
        expected: list[Fraction] = []
        if self.damage:
            offset = self._shift - self.origin if self.has_times else Fraction(0)
            times = sorted(time + offset for time in self._waiting)
            expected = [time for time in times if time > self.latest]
        if self.constant_rate and expected:
            expected = self._grid_to(expected[-1])
        last = max([self.latest, *expected])
        count = 0
        counted = self._from_start and self.container.format.name.startswith(("mov", "avi"))
        if self._index:
            expected = [time for _, time in self._index if time > self.latest]
        elif counted and self.stream.frames:
            count = self.stream.frames - self.packets
        elif not self.may_restart and (seconds := self.promised_seconds()) is not None:
            slack = max(min(0.5, 0.1 * seconds), 2 * float(self._widest_gap))
            if self.constant_rate and self.is_matroska:  # which rounds to milliseconds
                slack = 1.5 * float(self.step)
            if float(self._end) < seconds - slack:
                count = round((seconds - float(self._end)) / float(self.step)) if self.step else 1
                count -= len(expected)
        if count > 0 or expected:
            self.note("it ends before what its header promises")
        yield from self._lost(
            [*expected, *(last + number * self.step for number in range(1, count + 1))]
        )

    def promised_seconds(self) -> float | None:
        """Return the duration of the pictures that the header states, if any."""
        first = float(self.origin)
        alone = len(self.container.streams) == 1  # else it may be that of the sound
        if self.stream.duration and (alone or "asf" not in self.container.format.name):
            return float(self.stream.duration * self.base)
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.stream.metadata.get("DURATION", ""))
        if tag is not None:  # Matroska's
            hours, minutes, seconds = map(float, tag.groups())
            return 3600 * hours + 60 * minutes + seconds - first
        return self.container.duration / 1e6 - first if self.container.duration and alone else None

    def _lost(self, times: list[Fraction]) -> Iterator[LostFrames]:
        if times:
            yield LostFrames(tuple(map(float, times)), self.damage)
