from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from cosettle_adapter.analysis import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    Representation,
    RepresentationMetrics,
    Spectrum,
)
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.figures import SequenceChart
from cosettle_adapter.evaluation.html import Table
from cosettle_adapter.evaluation.report import (
    FailureFrame,
    ModelReport,
    distance_charts,
    lost_cells_frame,
    write_model_report,
)
from cosettle_adapter.evaluation.representation import LostCells

NASTY = "<script>alert('&\")</script>"
_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.texts)


def results(videos: int = 3) -> dict[str, Representation]:
    found = {}
    for index, kind in enumerate((RAW_LAST, RAW_SAME, CENTRED, ADAPTED)):
        generator = torch.Generator().manual_seed(index)
        metrics = RepresentationMetrics()
        for video in range(videos):
            metrics.add(torch.randn(3, 5, 4, 4, generator=generator), name=f"{NASTY}{video}")
        found[kind] = metrics.result()
    return found


def spectrum_of(*, gain: torch.Tensor) -> Spectrum:
    intra = torch.linspace(2, 0, len(gain)).double()
    return Spectrum(
        videos=2, pairs=1234, intra=intra, directions=torch.eye(len(gain)).double(),
        inter=3 * intra, inter_along=3 * intra, gain=gain.double(), inter_gain=gain.double(),
    )  # fmt: skip


def written(tmp_path: Path, report: ModelReport) -> Page:
    return Page(write_model_report(tmp_path / "deep" / "report.html", report).read_text("utf-8"))


def full_report() -> ModelReport:
    moment = LostCells(
        NASTY, "0.10 s to 0.90 s", torch.zeros(2, 3, 32, 48, dtype=torch.uint8),
        torch.tensor([[True, False], [True, True]]), 0.75,
    )  # fmt: skip
    return ModelReport(
        title=f"model {NASTY}",
        lead=NASTY,
        representation=results(),
        spectrum=spectrum_of(gain=torch.linspace(0.1, 2, 8)),
        charts=[*distance_charts(results()), SequenceChart(NASTY, NASTY, {NASTY: {NASTY: 1.0}})],
        failures=[lost_cells_frame(moment)],
        tables=[Table(NASTY, ("a", NASTY), [(NASTY, "1")], note=NASTY)],
        facts={NASTY: NASTY},
    )


def test_a_whole_page_needs_nothing_else_and_escapes_all(tmp_path: Path) -> None:
    page = written(tmp_path, full_report())
    assert "script" not in page.tags
    assert page.tags.count("svg") == 6
    assert page.tags.count("h2") == 8
    assert page.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    text = (tmp_path / "deep" / "report.html").read_text("utf-8")
    assert not re.search(r"(src|href|url|@import)[ =(]*[\"']?(https?:|//|/)", text)
    assert page.words.count(NASTY) >= 8


@pytest.mark.parametrize(
    "part", ["representation", "spectrum", "charts", "failures", "tables", "facts", "lead"]
)
def test_each_part_may_be_missing(tmp_path: Path, part: str) -> None:
    import dataclasses

    default = getattr(ModelReport("title"), part)
    page = written(tmp_path, dataclasses.replace(full_report(), **{part: default}))
    assert "h1" in page.tags


def test_all_parts_may_be_missing(tmp_path: Path) -> None:
    page = written(tmp_path, ModelReport("nothing"))
    assert "h2" not in page.tags
    assert "nothing" in page.words


def test_the_prediction_is_put_into_words(tmp_path: Path) -> None:
    page = written(tmp_path, ModelReport("m", spectrum=spectrum_of(gain=torch.linspace(0.1, 2, 8))))
    assert "prediction holds here" in page.words
    assert "correlation of -1.000;" in page.words
    assert "1,234 corresponding patches" in page.words
    page = written(tmp_path, ModelReport("m", spectrum=spectrum_of(gain=torch.linspace(2, 0.1, 8))))
    assert "prediction does not hold here" in page.words
    page = written(tmp_path, ModelReport("m", spectrum=spectrum_of(gain=torch.ones(8))))
    assert "treats all directions alike" in page.words


def test_the_table_has_the_figures(tmp_path: Path) -> None:
    found = results()
    page = written(tmp_path, ModelReport("m", representation=found, gamma=2.0, percentile=90.0))
    margin = found[ADAPTED].margin(gamma=2.0, percentile=90.0)
    assert f"{margin:.4f}" in page.words
    assert "D_inter - 2 D_intra" in page.words
    assert "twice the 90th percentile" in page.words
    with pytest.raises(ValueError, match="got percentile=50"):
        written(tmp_path, ModelReport("m", representation=found, percentile=50.0))


def test_a_single_kind_and_a_single_video_are_enough(tmp_path: Path) -> None:
    found = {"mine": results(1)[ADAPTED]}
    page = written(tmp_path, ModelReport("m", representation=found, charts=distance_charts(found)))
    assert "none" in page.words  # nothing to be apart from
    assert page.tags.count("svg") == 3


def test_bars_go_from_what_gains_most_to_what_loses_most(tmp_path: Path) -> None:
    values = {f"clip{i:03}": {RAW_LAST: 0.0, RAW_SAME: 1.0, ADAPTED: float(i)} for i in range(100)}
    values["broken"] = {RAW_SAME: 1.0, ADAPTED: math.nan}
    page = written(tmp_path, ModelReport("m", charts=[SequenceChart("J&F", "J&F", values)]))
    shown = [text for text in page.texts if re.fullmatch(r"clip\d{3}|broken", text)]
    assert shown == [
        *(f"clip{i:03}" for i in range(99, 79, -1)), *(f"clip{i:03}" for i in range(18, -1, -1)),
        "broken",
    ]  # fmt: skip
    assert "The first and the last 20 of 101." in page.words
    assert "In the order of adapted minus raw same block." in page.words


def test_lost_cells_are_red_and_others_as_they_were() -> None:
    frames = torch.full((2, 3, 32, 48), 100, dtype=torch.uint8)
    home = torch.tensor([[True, False], [True, True]])
    shown = lost_cells_frame(LostCells("clip", "frame 1 to 4", frames, home, 0.75))
    assert shown.image.shape == (3, 32, 98)
    assert shown.image[:, 8, 12].tolist() == [100, 100, 100]
    red, green, _ = shown.image[:, 8, 36].tolist()
    assert red > 150 > 90 > green
    assert shown.image[:, 24, 36].tolist() == [100, 100, 100]
    assert shown.image[:, 8, 60].tolist() == [100, 100, 100]  # the second frame is not touched
    assert shown.caption == (
        "clip, frame 1 to 4: 75 % of the cells come home, those in red do not."
    )


def test_what_cannot_be_shown_is_said_and_leaves_the_old_page(tmp_path: Path) -> None:
    path = write_model_report(tmp_path / "r.html", ModelReport("old"))
    broken = FailureFrame(torch.zeros(3, 4, 4), "float")
    with pytest.raises(FrameError, match=r"picture of shape \(3, 4, 4\) and dtype torch\.float32"):
        write_model_report(path, ModelReport("new", failures=[broken]))
    assert "old" in path.read_text("utf-8")
    with pytest.raises(ValueError, match="got row 0 of table 't' with 1 cells, expected 2"):
        Table("t", ("a", "b"), [("x",)])
