"""Whether a video file was read as far as its header promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosettle_adapter.errors import TruncatedVideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# Containers round, and frames may be dropped at the end, so this much may be missing: seconds,
# but no more than this share of a short clip, and at least this many of the widest gap between
# frames, as the last frame of a still scene may stand for long.
_SLACK_SECONDS = 0.5
_SLACK_SHARE = 0.1
_SLACK_GAPS = 2.0


class Completeness:
    """What a header promises against what was read.

    Attributes:
        streams: the streams whose packets must be shown to :meth:`saw_packet`.
        frames: the number of frames promised, or None.
        seconds: the length promised, or None.
        partial_tail: set by the reader when the file's last packet is cut off.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.frames: int | None = stream.frames or None
        self.seconds: float | None = None
        self.streams: list[Any] = [stream]
        self.partial_tail = False
        self._origin = self._reached = self._shown = self._widest_gap = 0.0
        self._read = 0
        self._last: float | None = None
        base: Any = stream.time_base or 0
        tag = _tagged_seconds(stream.metadata)
        if self.frames and container.format.name == "avi":
            # the duration of a cut AVI file is estimated from its size; its frame count is not
            self.seconds = float(self.frames * base)
        elif stream.duration:
            self.seconds = float(stream.duration * base)
        elif tag is not None or container.duration:
            self.seconds = (container.duration or 0) / 1e6 if tag is None else tag
            # such lengths count from zero, and may be those of another stream
            self._origin = float((stream.start_time or 0) * base)
            if tag is None:
                self.streams = [s for s in container.streams if s.type in ("video", "audio")]

    def saw_packet(self, packet: Packet[Any]) -> None:
        """Note how far a packet of another stream reaches."""
        if packet.pts is not None and packet.time_base is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            self._reached = max(self._reached, end - self._origin)

    def saw_frame(self, time: float, duration: float) -> None:
        """Note a frame: its time from the stream's start, how long it is shown."""
        if self._last is not None:
            self._widest_gap = max(self._widest_gap, time - self._last)
        self._read += 1
        self._last = time
        self._shown = max(self._shown, time + duration)
        self._reached = max(self._reached, self._shown)

    def check(self, source: object, frames_read: int, *, from_start: bool) -> None:
        """Raise :class:`TruncatedVideoError` if the file ended too early.

        ``from_start`` tells that every frame was seen, not only those after a seek.
        """
        if not self.partial_tail:
            whole = from_start and self.frames is not None and self._read >= self.frames
            if self.seconds is None or whole:
                return
            slack = min(_SLACK_SECONDS, _SLACK_SHARE * self.seconds)
            slack = max(slack, _SLACK_GAPS * self._widest_gap)
            if self._reached + self._origin >= self.seconds - slack:
                return
        raise TruncatedVideoError(
            f"{source} ends early: {self.promise(from_start=from_start)}", frames_read=frames_read
        )

    def promise(self, *, from_start: bool) -> str:
        """Describe how much was read, and of how much the header promises."""
        frames = f"{self._read} of {self.frames} frames" if self.frames else f"{self._read} frames"
        length = "unknown length" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"read {frames + ', ' if from_start else ''}{self._shown:.2f} s of {length}"


def _tagged_seconds(metadata: dict[str, str]) -> float | None:
    """Read Matroska's ``DURATION`` tag of a stream, like ``00:00:02.600000000``."""
    try:
        hours, minutes, seconds = metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return None
