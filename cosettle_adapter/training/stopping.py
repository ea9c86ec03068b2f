"""Ctrl-C and SIGTERM as a request that the loop answers after the step."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

_IMPATIENT_AFTER = 1.0
"""Seconds after which another Ctrl-C is meant; launchers repeat the first one."""


class StopRequest:
    """Whether somebody asked the run to stop.

    Attributes:
        signal: the signal that asked, or ``None``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal; a second Ctrl-C raises ``KeyboardInterrupt`` at once."""
        del frame
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            logger.warning("finishing this step, then saving; Ctrl-C again stops at once")
        elif number == signal.SIGINT and time.monotonic() - self._since > _IMPATIENT_AFTER:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs; in the main thread only, which gets them."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, request.receive)
    try:
        yield request
    finally:
        for kind, handler in before.items():
            signal.signal(kind, signal.SIG_DFL if handler is None else handler)
