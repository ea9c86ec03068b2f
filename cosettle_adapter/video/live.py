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

_WAITING = 64  # frames that may wait for the consumer
_TOLD = 100  # times of dropped frames that are kept for the consumer
_NONE_DROPPED = LostFrames((), "they came faster than they were read")
_ATTEMPTS = 10  # at connecting again, in a row
_PAUSES = (0.5, 10.0)  # seconds before the first attempt, which double, and at most
_JOIN_TIMEOUT = 1.0  # seconds; the thread may be held up in a read, and ends after it


def read_live(
    source: Input, select: FrameSelection
) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield the frames of a live input as they arrive; closing ends it.

    If frames wait for the consumer, the oldest ones are dropped and reported as lost. When the
    input ends or fails, it is opened again; times go on with the seconds that passed.

    Raises:
        FrameError: it cannot be opened at first; or, if damage is an error, not again.
    """
    feed = _Feed(source, select)
    thread = threading.Thread(target=feed.run, name="cosettle-live", daemon=True)
    thread.start()
    try:
        while (item := feed.next()) is not None:
            yield item
            del item
    finally:
        feed.closed.set()
        if thread is not threading.current_thread():  # where garbage may be collected
            thread.join(_JOIN_TIMEOUT)


class _Feed:
    """What passes between the thread that reads and the consumer."""

    def __init__(self, source: Input, select: FrameSelection) -> None:
        self.source, self.select = source, select
        self.closed = threading.Event()  # by the consumer
        self._changed = threading.Condition()
        self._waiting: deque[PendingFrame | LostFrames | BaseException | None] = deque()
        self._dropped = _NONE_DROPPED  # since the consumer last asked
        self._latest, self._arrived = 0.0, 0.0  # seconds of the last frame, and when it arrived

    def next(self) -> PendingFrame | LostFrames | None:
        """Wait for what comes next; ``None`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            if self._dropped.times:
                dropped, self._dropped = self._dropped, _NONE_DROPPED
                return dropped
            item = self._waiting.popleft()
        if isinstance(item, BaseException):
            raise item
        return item

    def _put(self, item: PendingFrame | LostFrames | BaseException | None) -> None:
        """Hand an item to the consumer; drop the oldest one if too many wait."""
        with self._changed:
            if len(self._waiting) == _WAITING:
                oldest = self._waiting.popleft()
                times = self._dropped.times
                if isinstance(oldest, PendingFrame):
                    times += (oldest.time,)
                elif isinstance(oldest, LostFrames):
                    times += oldest.times
                unlisted = self._dropped.unlisted + len(times[_TOLD:])
                self._dropped = LostFrames(times[:_TOLD], _NONE_DROPPED.reason, unlisted)
            self._waiting.append(item)
            self._changed.notify()

    def run(self) -> None:
        """Read until closed, or until the input cannot be opened again."""
        end: BaseException | None = None
        try:
            self._read()
        except BaseException as error:  # raised by the consumer
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
                problem = reason(error.__cause__ or error)
            if self.closed.is_set() or self.source.once:
                return
            failures = 1 if self._arrived != before else failures + 1
            logger.warning("%s: connecting again (%s)", self.source, problem)
            self.closed.wait(min(_PAUSES[0] * 2 ** (failures - 1), _PAUSES[1]))
        message = f"{self.source} is over: {_ATTEMPTS} attempts to connect again failed ({problem})"
        if self.select.on_damage == "error":
            raise FrameError(message)
        logger.warning(message)

    def _read_connection(self) -> None:
        """Read what arrives until the input ends or the consumer has closed it."""
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
