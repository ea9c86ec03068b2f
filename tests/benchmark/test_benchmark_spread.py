from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.benchmark.row import Target, faster, longer, value
from cosettle_adapter.benchmark.size import line
from cosettle_adapter.benchmark.spread import Ratio, Spread
from cosettle_adapter.benchmark.timing import Timed, in_turn, repeated
from cosettle_adapter.benchmark.words import cells, number

TIMES = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@given(TIMES)
def test_a_spread_holds_its_median(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.median == pytest.approx(statistics.median(values))
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)
    assert spread.count == len(values)


def test_a_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="one or more measurements"):
        Spread.of([])


@given(TIMES, st.floats(0.1, 10))
def test_sides_that_always_keep_their_ratio_have_it_for_sure(
    seconds: list[float], factor: float
) -> None:
    # a machine that gets slower and slower, but for both alike
    ratio = Ratio.of([factor * second for second in seconds], seconds)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


def test_the_interval_widens_with_noise_and_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = (1 + torch.rand(20, generator=generator)).tolist()
    ratio = Ratio.of(noisy, [1.0] * 20)
    assert ratio.low < ratio.value < ratio.high
    assert ratio == Ratio.of(noisy, [1.0] * 20)


def test_a_ratio_needs_pairs() -> None:
    with pytest.raises(ValueError, match="one or more pairs, got 2 and 1"):
        Ratio.of([1, 2], [1])


def test_sides_are_run_in_the_order_abba() -> None:
    order: list[str] = []
    timed = in_turn(
        lambda: order.append("a"),
        lambda: order.append("b"),
        repeats=4,
        device=torch.device("cpu"),
    )
    assert "".join(order) == "ab" + "abba" * 2
    assert len(timed.ours) == len(timed.other) == 4
    assert len(repeated(lambda: order.append("c"), repeats=3, device=torch.device("cpu"))) == 3
    assert order.count("c") == 4


def test_rates_and_times_are_ratios_the_right_way_round() -> None:
    timed = Timed(ours=[2.0, 2.0], other=[1.0, 1.0])
    about = {"benchmark": "b", "title": "t", "what": "w", "beside": "o"}
    slower = faster(timed, 10, unit="frames/s", target=Target(0.97, at_least=True), **about)
    assert slower.other is not None
    assert (slower.figure.value, slower.ours.median, slower.other.median) == (0.5, 5, 10)
    assert slower.met is False
    times = longer(timed, scale=1e3, unit="ms", target=Target(2, at_least=False), **about)
    assert (times.figure.value, times.ours.median, times.met) == (2, 2000, True)
    assert value([3.0], unit="ms", form="{:.0f} ms", **about).met is None


def test_rows_are_told_in_words() -> None:
    row = longer(
        Timed([0.123456], [0.1]),
        scale=1e3,
        unit="ms",
        benchmark="b",
        title="t",
        what="w",
        beside="o",
        target=Target(1.2, at_least=False),
    )
    words = cells(row.to_dict())
    assert words == (
        "w",
        "123 (123 to 123) ms",
        "100 (100 to 100) ms",
        "1.235 x",
        "1.235 x to 1.235 x",
        "≤ 1.200 x",
        "no",
    )
    assert [number(each) for each in (0, 0.01234, 12.345, 12345.6)] == [
        "0",
        "0.0123",
        "12.3",
        "12346",
    ]


def test_a_line_is_found() -> None:
    fixed, slope, explained = line([1, 2, 3], [5, 7, 9])
    assert (fixed, slope, explained) == pytest.approx((3, 2, 1))
    assert line([1, 2, 3], [1, -1, 1])[2] == pytest.approx(0)
