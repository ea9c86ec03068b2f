from __future__ import annotations

import dataclasses
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cosettle_adapter.evaluation.representation_metrics import RepresentationMetrics

from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.evaluation.figures import bar_section, representation_sections
from cosettle_adapter.evaluation.report import Section, Table, film, picture, write_page
from cosettle_adapter.evaluation.representation import (
    RepresentationReport,
    RepresentationSettings,
    WorstMoment,
)
from cosettle_adapter.evaluation.spectra import Spectrum
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME

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
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "poster")]
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


def spectrum_of(gain: torch.Tensor) -> Spectrum:
    intra = torch.linspace(2, 0, len(gain)).double()
    return Spectrum(
        videos=2, pairs=1234, intra=intra, directions=torch.eye(len(gain)).double(),
        inter=3 * intra, inter_along=3 * intra, gain=gain.double(),
    )  # fmt: skip


FALLING, RISING = torch.linspace(0.1, 2, 8), torch.linspace(2, 0.1, 8)


def report(videos: int = 3, variants: tuple[str, ...] = (RAW_LAST, RAW_SAME, CENTRED, ADAPTED)):  # type: ignore[no-untyped-def]
    results = {}
    for index, variant in enumerate(variants):
        generator = torch.Generator().manual_seed(index)
        metrics = RepresentationMetrics()
        for video in range(videos):
            metrics.add(torch.randn(3, 5, 4, 4, generator=generator), name=f"{NASTY}{video}")
        results[variant] = metrics.result()
    frames = torch.full((2, 3, 32, 48), 100, dtype=torch.uint8)
    consistent = torch.tensor([[True, False], [True, True]])
    moment = WorstMoment(NASTY, "0.10 s to 0.90 s", frames, consistent, 0.75)
    spectrum = spectrum_of(FALLING)
    return RepresentationReport(results, spectrum, (moment,), {}, RepresentationSettings())


def written(tmp_path: Path, sections: list[Section], **options: object) -> Page:
    path = write_page(
        tmp_path / "deep" / "r.html", title=f"model {NASTY}", sections=sections, **options
    )  # type: ignore[arg-type]
    return Page(path.read_text("utf-8"))


def test_a_whole_page_needs_nothing_else_and_escapes_all(tmp_path: Path) -> None:
    sections = representation_sections(report())
    sections.append(bar_section(NASTY, NASTY, {NASTY: {NASTY: 1.0}}, note=NASTY))
    sections.append(Section(NASTY, [Table("t", ("a", NASTY), [(NASTY, "1")], note=NASTY), NASTY]))
    page = written(tmp_path, sections, lead=NASTY, facts={NASTY: NASTY})
    assert "script" not in page.tags
    assert page.tags.count("svg") == 6
    assert page.tags.count("h2") == 8
    assert any(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    text = (tmp_path / "deep" / "r.html").read_text("utf-8")
    assert not re.search(r"(src|href|@import)[ =(]*[\"']?(https?:|//|/)", text)
    assert page.words.count(NASTY) >= 8
    assert f"{NASTY}2, adapted" in page.words, "names over the dots"
    assert "75 % of the patches are cycle-consistent, those in red are not" in page.words
    nothing = written(tmp_path, [Section("empty", []), bar_section("none", "", {})])
    assert "h2" not in nothing.tags


def test_the_prediction_is_put_into_words(tmp_path: Path) -> None:
    for gain, words in (
        (FALLING, "prediction holds here"),
        (RISING, "prediction does not hold here"),
        (torch.ones(8), "treats all directions alike"),
    ):
        found = dataclasses.replace(report(), spectrum=spectrum_of(gain))
        assert words in written(tmp_path, representation_sections(found)).words
    assert "correlation of -1.000;" in written(tmp_path, representation_sections(report())).words


def test_the_table_has_the_figures(tmp_path: Path) -> None:
    found = report()
    page = written(tmp_path, representation_sections(found, gamma=2.0, percentile=90.0))
    margin = found.results[ADAPTED].margin(gamma=2.0, percentile=90.0)
    assert f"{margin:.4f}" in page.words
    assert "D_inter - 2 D_intra" in page.words
    assert "twice the 90th percentile" in page.words
    with pytest.raises((ValueError, KeyError), match="50"):
        representation_sections(found, percentile=50.0)
    single = dataclasses.replace(report(1, ("mine",)), spectrum=None, failures=())
    page = written(tmp_path, representation_sections(single))
    assert "none" in page.words  # nothing to be apart from
    assert page.tags.count("svg") == 3


def test_bars_go_from_what_gains_most_to_what_loses_most(tmp_path: Path) -> None:
    values = {f"clip{i:03}": {RAW_LAST: 0.0, RAW_SAME: 1.0, ADAPTED: float(i)} for i in range(100)}
    values["broken"] = {RAW_SAME: 1.0, ADAPTED: math.nan}
    page = written(tmp_path, [bar_section("J&F", "J&F", values)])
    shown = [text for text in page.texts if re.fullmatch(r"clip\d{3}|broken", text)]
    first, last = (
        [f"clip{i:03}" for i in range(99, 79, -1)],
        [f"clip{i:03}" for i in range(18, -1, -1)],
    )
    assert shown == [*first, *last, "broken"]
    assert "The first and the last 20 of 101." in page.words
    assert "In the order of adapted minus raw same layer." in page.words


def test_inconsistent_patches_are_red_and_others_as_they_were() -> None:
    from cosettle_adapter.evaluation.figures import _marked

    moment = report().failures[0]
    image = _marked(moment.frames.float(), moment.consistent)
    assert image.shape == (3, 32, 98)
    assert image[:, 8, 12].tolist() == image[:, 24, 36].tolist() == [100, 100, 100]
    red, green, _ = image[:, 8, 36].tolist()
    assert red > 150 > 90 > green
    assert image[:, 8, 60].tolist() == [100, 100, 100]  # the second frame is not touched


def test_films_and_pictures_are_embedded(tmp_path: Path) -> None:
    for name in ("film.mp4", "still.PNG", "poster.webp"):
        (tmp_path / name).write_bytes(name.encode())
    parts = [
        film(tmp_path / "film.mp4", NASTY, poster=tmp_path / "poster.webp"),
        film(tmp_path / "still.PNG", "a still"),
        picture(torch.zeros(3, 4, 4, dtype=torch.uint8), "black"),
    ]
    page = written(tmp_path, [Section("", parts)])
    starts = ("data:video/mp4;base64,", "data:image/webp", "data:image/png", "data:image/jpeg")
    assert len(page.links) == 4
    assert all(any(link.startswith(start) for link in page.links) for start in starts)
    assert "h2" not in page.tags


def test_what_cannot_be_shown_is_said_and_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path / "r.html", title="old")
    with pytest.raises(FrameError, match=r"picture of shape \(3, 4, 4\) and dtype torch\.float32"):
        picture(torch.zeros(3, 4, 4), "float")
    with pytest.raises(ValueError, match=r"got 'film.avi', which a report cannot show; use one of"):
        film(tmp_path / "film.avi", "no")
    with pytest.raises(ValueError, match="got row 0 of table 't' with 1 cells, expected 2"):
        Table("t", ("a", "b"), [("x",)])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[report\]"):
        write_page(path, title="new")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[report\]"):
        bar_section("t", "l", {"a": {"b": 1.0}})
    assert "old" in path.read_text("utf-8")
