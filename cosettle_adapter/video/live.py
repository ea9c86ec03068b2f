"""Live inputs: cameras and network streams, read in a thread as frames arrive."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Generator

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.decoder import open_video
from cosettle_adapter.video.selection import FrameSelection, LostFrames, PendingFrame
from cosettle_adapter.video.sources import Input, reason

logger = logging.getLogger(__name__)

_BUFFER = 64  # frames kept for the consumer
_LISTED = 100  # dropped frames whose times are reported
_NONE_DROPPED = LostFrames((), "they arrived faster than they were read")
_ATTEMPTS = 10  # consecutive attempts to reconnect
_PAUSES = (0.5, 10.0)  # seconds before the first attempt, doubled for each next one, and the limit
_JOIN_TIMEOUT = 1.0  # seconds; a thread blocked in a read ends after it


def read_live(
    source: Input, select: FrameSelection
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield the frames of a live input as they arrive; closing the generator stops reading.

    If the consumer is too slow, the oldest frames are dropped and reported as lost. When the input
    ends or fails, it is opened again; times continue with the seconds that passed. A FrameError
    means that it cannot be opened, or not reopened if damage is an error.
    """
    reader = _Reader(source, select)
    thread = threading.Thread(target=reader.run, name="cosettle-live", daemon=True)
    thread.start()
    try:
        while (item := reader.next()) is not None:
            yield item
            del item
    finally:
        reader.closed.set()
        if thread is not threading.current_thread():  # garbage collection may run in it
            thread.join(_JOIN_TIMEOUT)


class _Reader:
    """Reads a live input in a thread and buffers its frames for the consumer."""

    def __init__(self, source: Input, select: FrameSelection) -> None:
        self.source, self.select = source, select
        self.closed = threading.Event()  # set by the consumer
        self._changed = threading.Condition()
        self._buffer: deque[PendingFrame | LostFrames | BaseException | None] = deque()
        self._dropped = _NONE_DROPPED  # since the last call of ``next``
        self._latest, self._arrived = 0.0, 0.0  # time of the last frame, and of its arrival

    def next(self) -> PendingFrame | LostFrames | None:
        """Wait for the next item and return it; ``None`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._buffer)
            if self._dropped.times:
                dropped, self._dropped = self._dropped, _NONE_DROPPED
                return dropped
            item = self._buffer.popleft()
        if isinstance(item, BaseException):
            raise item
        return item

    def _put(self, item: PendingFrame | LostFrames | BaseException | None) -> None:
        """Buffer an item; drop the oldest one if the buffer is full."""
        with self._changed:
            if len(self._buffer) == _BUFFER:
                oldest = self._buffer.popleft()
                times = self._dropped.times
                if isinstance(oldest, PendingFrame):
                    times += (oldest.time,)
                elif isinstance(oldest, LostFrames):
                    times += oldest.times
                unlisted = self._dropped.unlisted + len(times[_LISTED:])
                self._dropped = LostFrames(times[:_LISTED], _NONE_DROPPED.reason, unlisted)
            self._buffer.append(item)
            self._changed.notify()

    def run(self) -> None:
        """Read until closed, or until the input cannot be opened again."""
        end: BaseException | None = None
        try:
            self._read()
        except BaseException as error:  # ``next`` raises it
            end = error
        self._put(end)

    def _read(self) -> None:
        failures = 0
        while failures <= _ATTEMPTS:
            before = self._arrived
            try:
                self._read_connection()
                problem = "it ended"
            except (FrameError, OSError) as error:
                if not self._arrived or self.source.once:
                    raise
                problem = reason(error.__context__ or error)
            if self.closed.is_set() or self.source.once:
                return
            failures = 1 if self._arrived != before else failures + 1
            logger.warning("%s: reconnecting (%s)", self.source, problem)
            self.closed.wait(min(_PAUSES[0] * 2 ** (failures - 1), _PAUSES[1]))
        message = f"{self.source} ended: {_ATTEMPTS} attempts to reconnect failed ({problem})"
        if self.select.on_damage == "error":
            raise FrameError(message)
        logger.warning(message)

    def _read_connection(self) -> None:
        """Read one connection until it ends or the consumer closes the input."""
        with open_video(self.source, self.select, threads=False) as video:
            offset = self._latest + time.monotonic() - self._arrived if self._arrived else 0.0
            if not self._arrived:
                video.announce()
            with contextlib.closing(video.filtered(video.items())) as items:
                for item in items:
                    if self.closed.is_set():
                        return
                    if isinstance(item, LostFrames):
                        times = tuple(offset + lost for lost in item.times)
                        self._put(dataclasses.replace(item, times=times))
                        continue
                    self._latest, self._arrived = offset + float(item[0]), time.monotonic()
                    self._put(dataclasses.replace(video.pending(*item), exact=self._latest))
            video.report()
