"""Produce ahead of the consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

from cosettle_adapter.errors import FrameError

Item = TypeVar("Item")

# a producer that hangs in its own read must not hang the consumer's close
_PATIENCE = 5.0


def prefetch(iterable: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Iterate in a daemon thread that runs ahead by up to ``depth`` items, at least 1.

    An exception of the producer is raised here, after the items before it. When the consumer stops
    early, by closing this generator or dropping it, the producer stops after the item it is at and
    closes ``iterable`` if that is a generator. The thread starts with the first ``next``.
    """
    if depth < 1:
        raise FrameError(f"depth must be at least 1, got {depth}")
    return _consume(iterable, depth)


def _consume(iterable: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    # one item in a list, or how the producer ended: its error, or None
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
            yield received.pop()  # not kept alive while the next one is awaited
        if received is not None:
            raise received
    finally:
        received = None  # an error and its traceback would keep each other alive
        stop.set()
        # room for the item the producer may be waiting to hand over
        while not ready.empty():
            ready.get_nowait()
        # the collector may run in any thread, this one's producer included
        if producer is not threading.current_thread():
            producer.join(_PATIENCE)


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
    except BaseException as raised:  # the consumer raises it
        error = raised
    if not stop.is_set():
        ready.put(error)
