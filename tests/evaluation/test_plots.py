from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cosettle_adapter.evaluation.axes import Axis, Scale
from cosettle_adapter.evaluation.bars import bars
from cosettle_adapter.evaluation.plots import STYLE, Mark, legend, plot

NASTY = "<b>&\"'</b>"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def drawn(svg: str, tag: str) -> list[dict[str, str]]:
    return [element.attrib for element in parsed(svg).iter(tag)]


def words(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("text")]


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9),
    log=st.booleans(),
)
@hypothesis_settings(max_examples=80)
def test_an_axis_keeps_order_and_has_ticks_within(values: list[float], log: bool) -> None:
    scale = Scale(Axis("x", log=log), values, 50.0, 450.0)
    shown = sorted(value for value in values if scale.takes(value))
    pixels = [scale(value) for value in shown]
    assert all(50 - 1e-6 <= pixel <= 450 + 1e-6 for pixel in pixels)
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(pixels))
    ticks = scale.ticks()
    assert len(ticks) <= 25
    assert all(50 - 0.5 <= pixel <= 450 + 0.5 for pixel, _ in ticks)
    if not log:
        assert len(ticks) >= 3


@pytest.mark.parametrize(
    ("axis", "values", "labels"),
    [
        (Axis("x"), [0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis("x"), [3.0], ["2", "3", "4"]),
        (Axis("x", log=True), [0.002, 30.0], ["10⁻²", "10⁻¹", "10⁰", "10¹"]),
        (Axis("x", log=True), [2.2, 7.0], ["5"]),
        (Axis("x", log=True), [0.0, -3.0], ["10⁰", "10¹"]),
    ],
)
def test_ticks_are_round(axis: Axis, values: list[float], labels: list[str]) -> None:
    assert [label for _, label in Scale(axis, values, 0, 100).ticks()] == labels


def test_what_must_be_on_an_axis_is_and_ends_it() -> None:
    scale = Scale(Axis("x", include=(0.0,)), [2.0, 4.0], 0, 100)
    assert scale(0.0) == 0
    assert scale(4.0) < 100


def test_dots_lie_where_their_values_are() -> None:
    svg = plot(
        [Mark([0, 1, math.nan, 2], [0, 1, 1, math.inf], titles=["a", "b", "c", "d"])],
        title="t", x=Axis("x", include=(0, 1)), y=Axis("y", include=(0, 1)),
        width=400, height=300,
    )  # fmt: skip
    dots = drawn(svg, "circle")
    assert len(dots) == 2  # what is not finite is left out
    assert float(dots[0]["cx"]) < float(dots[1]["cx"])
    assert float(dots[0]["cy"]) > float(dots[1]["cy"])  # up is more
    assert [element.text for element in parsed(svg).iter("title")] == ["a", "b"]


def test_lines_links_and_levels() -> None:
    marks = [
        Mark([1, 10, 0, 100], [1, 2, 3, 4], "line", 2),
        Mark([1, 2, 3, math.nan, 5, 6], [1, 2, 3, 4, 5, 6], "links"),
    ]
    svg = plot(marks, title="t", x=Axis("x", log=True), y=Axis("y"), level=2.5)
    (line,) = drawn(svg, "polyline")
    assert line["class"] == "line k2"
    assert len(line["points"].split()) == 3  # zero has no logarithm
    paths = {path["class"]: path["d"] for path in drawn(svg, "path")}
    assert paths["links"].count("M") == paths["links"].count("L") == 2
    assert paths["level"].startswith("M64.0 ")


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars(
        ["a", "b"], {"raw": [1.0, math.nan], "adapted": [2.0, -1.0]},
        title="t", label="x", colours=[0, 3], form="{:.1f}",
    )  # fmt: skip
    widths = [float(rect["width"]) for rect in drawn(svg, "rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[3] == pytest.approx(widths[0], abs=0.2)
    assert widths[2] == 0
    left = [float(rect["x"]) for rect in drawn(svg, "rect")]
    assert left[3] < left[0] == left[1]  # below zero goes to the other side
    assert {"1.0", "2.0", "-1.0", "none"} <= set(words(svg))
    assert [rect["class"] for rect in drawn(svg, "rect")] == ["k0", "k3", "k0", "k3"]


def test_a_long_name_is_cut_and_kept_under_the_pointer() -> None:
    name = "a-very-long-name-of-a-sequence-that-goes-on.mp4"
    svg = bars([name], {"raw": [1.0]}, title="t", label="x", colours=[0])
    assert name not in words(svg)
    assert any(text.endswith("…") for text in words(svg))
    assert name in [element.text for element in parsed(svg).iter("title")]


def test_nothing_at_all_is_still_a_picture() -> None:
    assert not drawn(plot([], title="t", x=Axis("x"), y=Axis("y", log=True)), "circle")
    assert not drawn(bars([], {}, title="t", label="x", colours=[]), "rect")
    flat = bars(["a"], {"raw": [0.0]}, title="t", label="x", colours=[0])
    assert float(drawn(flat, "rect")[0]["width"]) == 0


def test_text_is_escaped_everywhere() -> None:
    svg = plot([Mark([1], [1], titles=[NASTY])], title=NASTY, x=Axis(NASTY), y=Axis(NASTY))
    assert parsed(svg).attrib["aria-label"] == NASTY
    assert words(svg).count(NASTY) == 2
    row = bars([NASTY], {NASTY: [1.0]}, title=NASTY, label=NASTY, colours=[0])
    assert words(row).count(NASTY) == 2
    assert "<b>" not in svg + row + legend({NASTY: 1})


def test_every_colour_has_a_rule() -> None:
    for index in range(6):
        assert f"--k{index}:" in STYLE
        assert f"svg.plot .k{index} {{" in STYLE
