"""Given frames of a video, each decoded from the keyframe before it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.streams import (
    VideoSource,
    display_matrix,
    frame_pixels,
    open_stream,
    reason,
)
from cosettle_adapter.video.timetable import Timetable, read_timetable

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# A header may promise frames that are not there; the last frame stands for those this near.
_TAIL_SECONDS = 0.5
# How many keyframes before the nearest one decoding begins, in turn; then at the file's start.
_ATTEMPTS = (0, 1, None)


class _Unreachable(Exception):  # noqa: N818  # an outcome of an attempt, never seen outside
    """A frame that this attempt does not reach; another one may."""


def count_frames(source: VideoSource) -> int:
    """Count the frames of a video without decoding them.

    Raises:
        FrameError: not a video, or one without frames.
        TruncatedVideoError: it ends before the length its header promises.
    """
    return len(read_timetable(source).places)


def read_frames(source: VideoSource, indices: Sequence[int]) -> Tensor:
    """Decode given frames of a video and as few others as possible.

    Frame ``i`` is the one that decoding the whole file would deliver at position ``i``, also
    where frames are coded out of order or unevenly spaced. The cost is that of decoding from the
    keyframe before each frame, in one thread; frames that no other one refers to are left out.
    In files without times, decoding begins at the start; in files whose times are in coding order,
    frames are counted from a keyframe. In files above
    :data:`~cosettle_adapter.video.timetable.SCAN_LIMIT` bytes frame ``i`` is the one shown at
    ``i`` times the average distance between frames, which is the same if they are evenly spaced.

    Args:
        source: a file, or where in a file it lies.
        indices: 0-based, in any order, repeated or not; at least one.

    Returns:
        (T, 3, H, W) uint8, upright, in the order of ``indices``.

    Raises:
        FrameError: not a video, no such frame, or a frame that cannot be decoded undamaged.
        TruncatedVideoError: it ends before the length its header promises.
    """
    table = read_timetable(source)
    if not indices:
        raise FrameError(f"no frames of {source} were asked for; give at least one index")
    last = len(table.places) - 1
    outside = [index for index in indices if not 0 <= index <= last]
    if outside:
        raise FrameError(f"{source} has frames 0 to {last}, got index {outside[0]}")
    wanted = [table.places[index] for index in indices]
    found = _find(source, table, sorted(set(wanted)))
    frames = [found[place] for place in wanted]
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({f"{frame.shape[-2]} x {frame.shape[-1]}" for frame in frames})
        raise FrameError(f"the frames of {source} are of several sizes: {', '.join(sizes)}")
    return torch.stack(frames)


def _find(source: VideoSource, table: Timetable, wanted: list[int]) -> Mapping[int, Tensor]:
    problem = ""
    for back in _ATTEMPTS if table.seekable else (None,):
        with open_stream(source) as (container, stream):
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            frames = _Frames(container, stream, table, frozenset(wanted), back)
            with contextlib.closing(frames):
                try:
                    return {place: frames.at(place) for place in wanted}
                except _Unreachable as missing:
                    problem = str(missing)
    raise FrameError(f"{source} cannot be decoded where it should: {problem}")


class _Frames:
    """A decoder that is asked for later and later frames."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        table: Timetable,
        wanted: frozenset[int],
        back: int | None,
    ) -> None:
        self._container, self._stream, self._table = container, stream, table
        self._wanted, self._back = wanted, back
        self._decoded: Generator[tuple[int, VideoFrame], None, None] | None = None
        self._latest: tuple[int, VideoFrame] | None = None
        self._turn: tuple[int, int, int, int] | None = None
        self._sought_time = 0

    def close(self) -> None:
        if self._decoded is not None:
            self._decoded.close()
        self._decoded = self._latest = None

    def at(self, place: int) -> Tensor:
        """Return the pixels of the first frame at ``place`` or after it, within tolerance."""
        earliest = place - self._table.tolerance
        if self._latest is None or self._latest[0] < earliest:
            self._latest = self._advance(place, earliest)
        frame = self._latest[1]
        if frame.is_corrupt:
            raise _Unreachable(f"the frame at {self._told(place)} is damaged")
        if self._turn is None:
            self._turn = display_matrix(frame)
        return frame_pixels(frame, self._turn)

    def _advance(self, place: int, earliest: int) -> tuple[int, VideoFrame]:
        sought = self._seek(place)
        if self._decoded is None:
            self._decoded = self._decode(0 if sought is None else sought)
        estimated = self._table.kind == "estimated"
        for reached, frame in self._decoded:
            if reached >= earliest:
                # a place that is passed at once: decoding began too late
                if sought is not None and reached > place and (not estimated or self._back == 0):
                    raise _Unreachable(f"no keyframe leads to {self._told(place)}")
                return reached, frame
            self._latest, sought = (reached, frame), None
        tail = int(_TAIL_SECONDS * self._table.second)
        if estimated and self._latest is not None and self._latest[0] >= place - tail:
            return self._latest
        raise _Unreachable(f"decoding ends before the frame at {self._told(place)}")

    def _seek(self, place: int) -> int | None:
        """Go to a keyframe unless decoding on is shorter; return its place if so."""
        if self._back is None:
            return None
        key, time = self._table.keyframe_before(place, self._back)
        if key > place or (self._latest is not None and key <= self._latest[0]):
            return None
        if self._latest is None and key <= self._table.places[0]:
            return None  # the file was just opened, so there it is
        self.close()
        av = extras.require("av", extra="video", purpose="reading video files")
        try:
            self._container.seek(time, stream=self._stream, backward=True)
        except (av.error.FFmpegError, OSError) as error:
            raise _Unreachable(f"seeking fails ({reason(error)})") from error
        self._sought_time = time
        return key

    def _decode(self, position: int) -> Generator[tuple[int, VideoFrame], None, None]:
        av = extras.require("av", extra="video", purpose="reading video files")
        by_position = self._table.kind == "positions"
        first = True
        try:
            for packet in self._container.demux(self._stream):
                self._spare(packet)
                try:
                    frames = self._stream.decode(packet)
                except av.error.InvalidDataError:
                    if not first:
                        raise
                    continue  # a recording may begin between keyframes
                for frame in frames:
                    if by_position and first and position and frame.pts != self._sought_time:
                        raise _Unreachable("seeking leads elsewhere")
                    first = False
                    if by_position:
                        yield position, frame
                    elif frame.pts is not None:
                        yield frame.pts, frame
                    position += 1
        except (av.error.FFmpegError, OSError) as error:
            raise _Unreachable(f"it breaks off ({reason(error)})") from error

    def _spare(self, packet: Packet[Any]) -> None:
        """Leave frames that no other one refers to undecoded, unless they are wanted."""
        sparing = self._table.kind == "times" and self._back is not None
        needless = sparing and packet.pts is not None and packet.pts not in self._wanted
        self._stream.codec_context.skip_frame = "NONREF" if needless else "DEFAULT"

    def _told(self, place: int) -> str:
        if self._table.kind == "positions":
            return f"position {place}"
        return f"{(place - self._table.places[0]) / self._table.second:g} s"
