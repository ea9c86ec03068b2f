"""A producer that runs ahead of its consumer, in a thread, by a bounded number of items."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()
_POLL = 0.05  # seconds between looks at whether the consumer has gone


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Yield ``items`` in order while a thread produces up to ``depth`` of them ahead.

    An exception of the producer is raised where it belongs, after the items before it. When the
    consumer stops early, the producer stops and its generator is closed.

    Args:
        items: what to produce; consumed in the thread alone.
        depth: items waiting at most.

    Raises:
        ValueError: ``depth`` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _consume(items, depth)


def _consume(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    waiting: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    worker = threading.Thread(
        target=_produce, args=(iter(items), waiting, stop), daemon=True, name="prefetch"
    )
    worker.start()
    try:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        stop.set()
        worker.join()


def _produce(items: Iterator[Any], waiting: queue.Queue[Any], stop: threading.Event) -> None:
    last: Any = _END
    try:
        for item in items:
            if not _put(waiting, item, stop):
                break
    except BaseException as error:  # handed to the consumer, who raises it
        last = _Raised(error)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
        _put(waiting, last, stop)


def _put(waiting: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            waiting.put(item, timeout=_POLL)
        except queue.Full:
            continue
        return True
    return False
