"""Which frames of a source to read: one object, wherever frames are chosen."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from cosettle_adapter.errors import FrameError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class PendingFrame:
    """A frame whose time is known and whose pixels are made when they are asked for."""

    time: float  # seconds from the start of the source
    name: str  # what errors call it: a file, or a position
    load: Callable[[], Tensor]  # makes the pixels, (3, H, W) uint8 or float in [0, 1]


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of a source to read; values out of range are a :class:`FrameError`.

    Attributes:
        start: first second to read, at least 0.
        end: second to stop before.
        every: keep every n-th frame of those in range.
        max_frames: keep at most this many frames.
        fps: frames per second of sources without timestamps (images, arrays); 1 by default, so
            that times are positions.
    """

    start: float | None = None
    end: float | None = None
    every: int = 1
    max_frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        first = self.start or 0
        if not first >= 0:
            raise FrameError(f"start must be at least 0 seconds, got {self.start}")
        if self.end is not None and not self.end > first:
            raise FrameError(f"end must come after start={first}, got end={self.end}")
        if self.every < 1:
            raise FrameError(f"every must be at least 1 (every frame), got {self.every}")
        if self.max_frames is not None and self.max_frames < 1:
            raise FrameError(f"max_frames must be at least 1, or None, got {self.max_frames}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise FrameError(f"fps must be positive, got {self.fps}")

    def of(
        self, frames: Generator[PendingFrame, None, None], source: str, *, skip: int = 0
    ) -> Generator[PendingFrame, None, None]:
        """Yield the wanted ones of frames in order of time, but the first ``skip``; close them.

        ``source`` is what a :class:`FrameError` calls them if none are wanted.
        """
        kept = in_range = 0
        times: list[float] = []
        with contextlib.closing(frames):
            for frame in frames:
                times = [*times[:1], frame.time]
                if self.start is not None and frame.time < self.start:
                    continue
                if self.end is not None and frame.time >= self.end:
                    break
                if in_range % self.every == 0:
                    if kept >= skip:
                        yield frame
                    kept += 1
                    if kept == self.max_frames:
                        return
                in_range += 1
        if not times:
            raise FrameError(f"{source} holds no frames")
        if not kept:
            until = "on" if self.end is None else f"to {self.end} s"
            raise FrameError(
                f"{source} has no frame from {self.start or 0} s {until}; "
                f"the frames met lie from {times[0]:g} s to {times[-1]:g} s"
            )


def selects_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Let keywords of version 0.1 (``start=``, ``every=``, ...) make ``select``, with a warning."""
    known = {field.name for field in fields(FrameSelection)}

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        old: dict[str, Any] = {name: options.pop(name) for name in known & options.keys()}
        if old and options.get("select") is not None:
            raise TypeError(f"got select and {', '.join(old)}; put them into FrameSelection")
        if old:
            said = f"pass select=FrameSelection({', '.join(f'{name}=...' for name in old)})"
            warnings.warn(f"{said}; the keywords go in 0.3", DeprecationWarning, stacklevel=2)
            options["select"] = FrameSelection(**old)
        return function(*args, **options)

    return call
