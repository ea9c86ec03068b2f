"""Select which frames of a source to read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, ParamSpec, TypeVar

from torch import Tensor

from cosettle_adapter.errors import FrameError

HDR = (16, 18)  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67: inputs of ``tone_map``
_NUMBERS = ("start", "end", "every", "fps", "max_frames", "source_fps", "stream_index")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class PendingFrame:
    """A frame with a known time, whose pixels are loaded on request."""

    exact: Fraction | float  # seconds since the first frame of the source
    name: str  # in error messages: a file or a position
    load: Callable[[], Tensor]  # returns (3, H, W) uint8 or float in [0, 1]
    concealed: bool = False  # whether the decoder concealed damage in it

    @property
    def time(self) -> float:
        """Seconds since the first frame of the source."""
        return float(self.exact)


@dataclass(frozen=True, eq=False)
class LostFrames:
    """Frames of a source that are lost to damage."""

    times: tuple[float, ...]  # when they would have been shown
    reason: str
    unlisted: int = 0  # number of further frames without times


@dataclass(frozen=True)
class FrameSelection:
    """Selection of frames of a source; other types or values are a :class:`FrameError`.

    Attributes:
        start: first second to read.
        end: second to stop before.
        every: keep every n-th frame in this range.
        fps: keep the frames nearest to a regular clock of this many per second, each once.
        times: keep the frames nearest to these seconds, each once.
        max_frames: largest number of frames to keep.
        source_fps: frames per second of a source without times: of images and arrays, whose times
            are positions by default, and of raw streams, whose rate is a guess by default.
        stream_index: stream of a file to read; by default its default video stream.
        square_pixels: widen or narrow the frames of a video whose pixels are not square.
        deinterlace: compute each frame of an interlaced video from one of its two fields and the
            neighbouring frames.
        tone_map: map HDR pictures (PQ, HLG) to BT.709, from the peak brightness in the video, else
            that of the format. FFmpeg first computes a table, which takes some seconds.
        live: whether a URL, device or pipe sends frames in real time. A live input is opened again
            when it ends, and its oldest unread frames are dropped. By default, cameras and URLs
            such as rtsp:, udp: and tcp: are live.
        decode_on: device that decodes videos, such as cuda, cuda:1, vaapi or videotoolbox; the CPU
            decodes videos that the device does not support.
        on_damage: how to take frames that are lost to damage: "warn" reports them and continues,
            "error" is an error (``DamagedError``).
    """

    start: float | None = None
    end: float | None = None
    every: int = 1
    fps: float | None = None
    times: tuple[float, ...] | None = None
    max_frames: int | None = None
    source_fps: float | None = None
    stream_index: int | None = None
    square_pixels: bool = False
    deinterlace: bool = False
    tone_map: bool = False
    live: bool | None = None
    decode_on: str | None = None
    on_damage: Literal["warn", "error"] = "warn"

    def __post_init__(self) -> None:
        if self.times is not None and not isinstance(self.times, (tuple, list)):
            raise FrameError(f"times must be a tuple or list of seconds, got {self.times!r}")
        given = [(name, getattr(self, name)) for name in _NUMBERS]
        for name, value in [*given, *(("times", time) for time in self.times or ())]:
            if not isinstance(value, Real) and (value is not None or name in ("every", "times")):
                raise FrameError(f"{name} must be a number, got {value!r}")
        if sum([self.every > 1, self.fps is not None, self.times is not None]) > 1:
            raise FrameError("give only one of every, fps and times")
        first = self.start or 0
        most = 1 if self.max_frames is None else self.max_frames
        ordered = itertools.pairwise((0.0, *(self.times or ())))  # NaN is in no order
        whole = "a whole number of at least 1"
        for name, in_range, expected in (
            ("start", first >= 0, "at least 0 seconds"),
            ("end", self.end is None or self.end > first, f"after start={first}"),
            ("every", self.every >= 1 and self.every % 1 == 0, whole),
            ("fps", self.fps is None or 0 < self.fps < math.inf, "positive"),
            ("times", all(a <= b for a, b in ordered), "increasing, from 0 on"),
            ("times", self.times is None or len(self.times) > 0, "at least one"),
            ("max_frames", most >= 1 and most % 1 == 0, whole),
            ("source_fps", self.source_fps is None or 0 < self.source_fps < math.inf, "positive"),
            ("on_damage", self.on_damage in ("warn", "error"), "'warn' or 'error'"),
        ):
            if not in_range:
                raise FrameError(f"{name} must be {expected}, got {getattr(self, name)}")

    def of(
        self,
        frames: Generator[PendingFrame | LostFrames, None, None],
        source: str,
        *,
        skip: int = 0,
    ) -> Generator[PendingFrame | LostFrames, None, None]:
        """Yield the selected frames, in order of time, and what was lost; close ``frames``.

        The first ``skip`` of the selected are left out. If none is selected, a
        :class:`FrameError` names the ``source``.
        """
        kept = 0
        read: list[float] = []
        with contextlib.closing(frames):
            for item in self._sampled(self._in_range(frames, read), source):
                if isinstance(item, PendingFrame):
                    kept += 1
                    if kept <= skip:
                        continue
                yield item
                if kept == self.max_frames and isinstance(item, PendingFrame):
                    return
        if not read:
            raise FrameError(f"{source} holds no frames")
        if not kept:
            until = "on" if self.end is None else f"to {self.end} s"
            raise FrameError(
                f"{source} has no frame from {self.start or 0} s {until}; "
                f"the frames read range from {read[0]:g} s to {read[-1]:g} s"
            )

    def _in_range(
        self, frames: Iterable[PendingFrame | LostFrames], read: list[float]
    ) -> Iterator[PendingFrame | LostFrames]:
        """Yield what lies in the range; set ``read`` to the first and the last time read."""
        first, last = self.start or 0, math.inf if self.end is None else self.end
        for item in frames:
            if isinstance(item, LostFrames):
                times = tuple(time for time in item.times if first <= time < last)
                if times:
                    yield dataclasses.replace(item, times=times)
                continue
            read[1:] = [item.time]
            if item.time >= last:
                break
            if self.start is None or item.time >= first:
                yield item

    def _sampled(
        self, items: Iterator[PendingFrame | LostFrames], source: str
    ) -> Iterator[PendingFrame | LostFrames]:
        """Keep every n-th frame, or those nearest to the clock or to ``times``."""
        if self.fps is None and self.times is None:
            position = 0
            for item in items:
                if isinstance(item, LostFrames) or position % self.every == 0:
                    yield item
                position += isinstance(item, PendingFrame)
            return
        targets: Iterator[float] | None = None if self.times is None else iter(self.times)
        target: float | None = None
        before: PendingFrame | None = None
        last: PendingFrame | None = None
        for item in items:
            if isinstance(item, LostFrames):
                yield item
                continue
            if before is None:
                if targets is None:  # the clock starts with the first frame
                    begin = item.time
                    targets = (begin + tick / (self.fps or 1) for tick in itertools.count())
                target = next(targets, None)
            while target is not None and item.time >= target:
                nearest = item
                if before is not None and target - before.time <= item.time - target:
                    nearest = before
                if nearest is not last:
                    yield nearest
                last, target = nearest, next(targets or iter(()), None)
            if target is None:
                return
            before = item
        if self.times is not None and target is not None:
            if before is None or target > before.time + 1:
                ends = "" if before is None else f"; its last frame is at {before.time:g} s"
                raise FrameError(f"{source} has no frame near {target:g} s{ends}")
            if before is not last:
                yield before


def selects_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Accept the keywords of version 0.1 (``start=``, ``every=``, ...) with a warning."""
    known = {name: name for name in ("start", "end", "every", "max_frames")} | {"fps": "source_fps"}

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        old: dict[str, Any] = {
            known[name]: options.pop(name) for name in known.keys() & options.keys()
        }
        if old and options.get("select") is not None:
            raise TypeError(f"got select and {', '.join(old)}; put them into FrameSelection")
        if old:
            names = ", ".join(f"{name}=..." for name in old)
            message = f"pass select=FrameSelection({names}); version 0.3 removes the keywords"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            options["select"] = FrameSelection(**old)
        return function(*args, **options)

    return call
