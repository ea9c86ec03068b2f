from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import prefetch


class Producer:
    """Counts up, and notes what becomes of it."""

    def __init__(self, count: int = 1_000_000, *, fail_at: int | None = None) -> None:
        self.count = count
        self.fail_at = fail_at
        self.made: list[int] = []
        self.thread: threading.Thread | None = None
        self.closed = threading.Event()

    def __call__(self) -> Iterator[int]:
        self.thread = threading.current_thread()
        try:
            for number in range(self.count):
                if number == self.fail_at:
                    raise ZeroDivisionError(f"at {number}")
                self.made.append(number)
                yield number
        finally:
            self.closed.set()

    def assert_finished(self) -> None:
        assert self.closed.wait(10)
        assert self.thread is not None
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_everything_arrives_in_order(depth: int) -> None:
    producer = Producer(20)
    assert list(prefetch(producer(), depth)) == list(range(20))
    producer.assert_finished()
    assert list(prefetch([3, 1, 2])) == [3, 1, 2]
    with pytest.raises(TypeError):
        list(prefetch(7))  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="depth must be at least 1, got 0"):
        prefetch([], depth=0)


def test_the_producer_runs_ahead_in_a_daemon_thread_and_no_further_than_told() -> None:
    producer = Producer()
    ahead = prefetch(producer(), depth=2)
    assert next(ahead) == 0
    while len(producer.made) < 4:  # 0 is consumed, 1 and 2 wait, 3 is in hand
        time.sleep(0.001)
    time.sleep(0.05)
    assert producer.made == [0, 1, 2, 3]
    assert producer.thread is not None
    assert producer.thread is not threading.main_thread()
    assert producer.thread.daemon
    ahead.close()


def test_an_exception_comes_after_the_items_before_it() -> None:
    producer = Producer(fail_at=3)
    ahead = prefetch(producer())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="at 3"):
        next(ahead)
    producer.assert_finished()


def _close(ahead: Iterator[int]) -> None:
    ahead.close()  # type: ignore[attr-defined]


def _forget(ahead: Iterator[int]) -> None:
    del ahead
    gc.collect()


@pytest.mark.parametrize("leave", [_close, _forget])
@pytest.mark.parametrize("depth", [1, 3])
def test_leaving_early_stops_the_producer_and_closes_it(
    leave: Callable[[Iterator[int]], None], depth: int
) -> None:
    threads = threading.active_count()
    unstarted = Producer()
    prefetch(unstarted()).close()
    assert not unstarted.made
    producer = Producer()
    held = [prefetch(producer(), depth)]
    assert next(held[0]) == 0
    leave(held.pop())
    producer.assert_finished()
    assert len(producer.made) <= depth + 3
    assert threading.active_count() == threads
