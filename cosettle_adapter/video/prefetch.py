"""Iterate ahead of the consumer in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

from cosettle_adapter.errors import FrameError

Item = TypeVar("Item")

_JOIN_TIMEOUT = 5.0  # seconds; a producer that hangs in a read must not block the consumer


def prefetch(iterable: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Iterate in a daemon thread that runs ahead by up to ``depth`` items, at least 1.

    An exception in the producer is raised here after the items before it. When the consumer closes
    or drops this generator, the producer stops after its current item and closes ``iterable`` if
    that is a generator. The thread starts with the first ``next``.
    """
    if depth < 1:
        raise FrameError(f"depth must be at least 1, got {depth}")
    return _consume(iterable, depth)


def _consume(iterable: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    # one item in a list; at the end the producer's error, or None
    ready: queue.Queue[list[Item] | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    producer = threading.Thread(
        target=_produce, args=(iterable, ready, stop), name="cosettle-prefetch", daemon=True
    )
    del iterable  # the thread alone keeps it alive
    producer.start()
    received: list[Item] | BaseException | None = None
    try:
        while isinstance(received := ready.get(), list):
            yield received.pop()  # no reference is kept while waiting for the next
        if received is not None:
            raise received
    finally:
        received = None  # breaks the cycle of an error and its traceback
        stop.set()
        # make room for an item that the producer is waiting to put
        while not ready.empty():
            ready.get_nowait()
        # garbage collection may close this generator in the producer thread
        if producer is not threading.current_thread():
            producer.join(_JOIN_TIMEOUT)


def _produce(
    iterable: Iterable[Item],
    ready: queue.Queue[list[Item] | BaseException | None],
    stop: threading.Event,
) -> None:
    error: BaseException | None = None
    try:
        iterator = iter(iterable)
        try:
            for item in iterator:
                ready.put([item])
                del item
                if stop.is_set():
                    break
        finally:
            if isinstance(iterator, Generator):
                iterator.close()
    except BaseException as raised:  # raised by the consumer
        error = raised
    if not stop.is_set():
        ready.put(error)
