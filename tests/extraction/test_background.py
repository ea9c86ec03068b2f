from __future__ import annotations

import threading

import pytest
from cosettle_adapter.extraction.background import in_background


def test_items_are_worked_on_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with in_background(done.append) as hand_over:
        for item in range(20):
            hand_over(item)
    assert done == list(range(20))


def test_what_was_handed_over_is_done_though_the_block_fails() -> None:
    done: list[int] = []

    def interrupted() -> None:
        with in_background(done.append) as hand_over:
            hand_over(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


@pytest.mark.parametrize("items", [1, 10])
def test_an_error_of_the_work_is_raised_as_it_is(items: int) -> None:
    problem = OSError("disk full")
    seen: list[int] = []

    def work(item: int) -> None:
        seen.append(item)
        raise problem

    def fill() -> None:
        with in_background(work) as hand_over:
            for item in range(items):
                hand_over(item)

    with pytest.raises(OSError, match="disk full") as caught:
        fill()
    assert caught.value is problem
    assert seen == [0], "nothing is done after a failure"


def test_no_more_than_a_few_wait() -> None:
    go = threading.Event()
    handed = 0
    full = threading.Event()

    def produce() -> None:
        nonlocal handed
        with in_background(lambda _: go.wait(60), depth=2) as hand_over:
            for item in range(6):
                hand_over(item)
                handed += 1
                if handed == 3:
                    full.set()

    thread = threading.Thread(target=produce)
    thread.start()
    assert full.wait(60)
    assert handed == 3, "one at work and two waiting"
    go.set()
    thread.join()
    assert handed == 6
