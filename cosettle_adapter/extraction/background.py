"""Work on items in a thread of its own, in order, while the caller makes the next one."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


@contextlib.contextmanager
def in_background(
    work: Callable[[Item], None], *, depth: int = 2
) -> Iterator[Callable[[Item], None]]:
    """Yield a function that hands items to ``work``, which runs in a thread.

    At most ``depth`` items wait; then handing over waits too. When the block ends, whichever way,
    what was handed over is worked on first. An exception of ``work`` is raised as it is, when
    the next item is handed over or at the end of the block, and no further item is worked on.

    Args:
        work: what to do with an item.
        depth: number of items that may wait.
    """
    waiting: queue.Queue[tuple[Item] | None] = queue.Queue(maxsize=depth)
    failures: list[BaseException] = []

    def loop() -> None:
        while (taken := waiting.get()) is not None:
            if failures:
                continue  # so that nobody waits for room
            try:
                work(taken[0])
            except BaseException as error:  # the caller raises it
                failures.append(error)
            del taken

    def hand_over(item: Item) -> None:
        if failures:
            raise failures[0]
        waiting.put((item,))

    thread = threading.Thread(target=loop, name="cosettle-writer", daemon=True)
    thread.start()
    try:
        yield hand_over
    finally:
        waiting.put(None)
        thread.join()
    if failures:
        raise failures[0]
