"""Select which frames of a source to read."""

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
    """A frame with a known time, whose pixels are loaded on request."""

    time: float  # seconds from the start of the source
    name: str  # in error messages: a file or a position
    load: Callable[[], Tensor]  # returns (3, H, W) uint8 or float in [0, 1]


@dataclass(frozen=True)
class FrameSelection:
    """Selection of frames of a source; values out of range are a :class:`FrameError`.

    Attributes:
        start: first second to read.
        end: second to stop before.
        every: keep every n-th frame in this range.
        max_frames: largest number of frames to keep.
        fps: frames per second of images and arrays; by default 1, so times are positions.
    """

    start: float | None = None
    end: float | None = None
    every: int = 1
    max_frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        first = self.start or 0
        for name, in_range, expected in (
            ("start", first >= 0, "at least 0 seconds"),
            ("end", self.end is None or self.end > first, f"after start={first}"),
            ("every", self.every >= 1, "at least 1 (every frame)"),
            ("max_frames", self.max_frames is None or self.max_frames >= 1, "at least 1, or None"),
            ("fps", self.fps is None or 0 < self.fps < math.inf, "positive"),
        ):
            if not in_range:
                raise FrameError(f"{name} must be {expected}, got {getattr(self, name)}")

    def of(
        self, frames: Generator[PendingFrame, None, None], source: str, *, skip: int = 0
    ) -> Generator[PendingFrame, None, None]:
        """Yield the selected frames after the first ``skip``; ``frames``, in order, are closed.

        Raises:
            FrameError: no frame of ``source``, which is its name, is selected.
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
                f"the frames read range from {times[0]:g} s to {times[-1]:g} s"
            )


def selects_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Accept the keywords of version 0.1 (``start=``, ``every=``, ...) with a warning."""
    known = {field.name for field in fields(FrameSelection)}

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        old: dict[str, Any] = {name: options.pop(name) for name in known & options.keys()}
        if old and options.get("select") is not None:
            raise TypeError(f"got select and {', '.join(old)}; put them into FrameSelection")
        if old:
            names = ", ".join(f"{name}=..." for name in old)
            message = f"pass select=FrameSelection({names}); version 0.3 removes the keywords"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            options["select"] = FrameSelection(**old)
        return function(*args, **options)

    return call
