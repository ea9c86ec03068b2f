from __future__ import annotations

import base64
import io
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosettle_adapter.errors import MissingExtraError
from cosettle_adapter.evaluation.report import (
    Figure,
    Section,
    Table,
    bar_section,
    film,
    representation_sections,
    write_page,
)
from cosettle_adapter.evaluation.representation import (
    RepresentationMetrics,
    RepresentationReport,
    WorstMoment,
)
from cosettle_adapter.evaluation.spectra import Spectrum
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME

from helpers import noise

NASTY = "<script>alert('&\")</script>"
MOMENT = WorstMoment(
    NASTY,
    "0.10 s to 0.90 s",
    torch.full((2, 3, 32, 48), 100, dtype=torch.uint8),
    torch.tensor([[True, False], [True, True]]),
    0.75,
)


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
        self.words = " ".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        links = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.links += links

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report(videos: int = 3) -> RepresentationReport:
    results = {}
    for index, variant in enumerate((RAW_LAST, RAW_SAME, CENTRED, ADAPTED)):
        metrics = RepresentationMetrics()
        for video in range(videos):
            metrics.add(noise(3, 5, 4, 4, seed=9 * index + video), name=f"{NASTY}{video}")
        results[variant] = metrics.result()
    intra = torch.linspace(2, 0, 8).double()
    gain = torch.linspace(0.1, 2, 8).double()
    spectrum = Spectrum(2, 1234, intra, torch.eye(8).double(), 3 * intra, 3 * intra, gain)
    return RepresentationReport(results, spectrum, (MOMENT,), {})


def written(tmp_path: Path, sections: list[Section], **options: object) -> Page:
    path = tmp_path / "deep" / "r.html"
    write_page(path, title=f"model {NASTY}", sections=sections, **options)  # type: ignore[arg-type]
    return Page(path.read_text("utf-8"))


def test_a_whole_page_needs_nothing_else_and_escapes_all(tmp_path: Path) -> None:
    sections = representation_sections(report())
    sections.append(bar_section(NASTY, NASTY, {NASTY: {NASTY: 1.0}}))
    sections.append(Section(NASTY, [Table("t", ("a", NASTY), [(NASTY, "1")], note=NASTY), NASTY]))
    sections += [Section("empty", []), bar_section("none", "", {})]
    page = written(tmp_path, sections, lead=NASTY, facts={NASTY: NASTY})
    assert "script" not in page.tags
    assert page.tags.count("svg") == 7
    assert page.tags.count("h2") == 8, "sections without parts are left out"
    assert any(link.startswith("data:image/png;base64,") for link in page.links)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    text = (tmp_path / "deep" / "r.html").read_text("utf-8")
    assert not re.search(r"(src|href|@import)[ =(]*[\"']?(https?:|//|/)", text)
    assert page.words.count(NASTY) >= 8
    assert "75 % of the patches are cycle-consistent, those in red are not" in page.words
    assert "variance within videos is -1.000;" in page.words
    assert f"{report().results[ADAPTED].figures['margin D']:.4f}" in page.words


def test_a_single_video_has_nothing_to_be_apart_from(tmp_path: Path) -> None:
    found = report(1)._replace(spectrum=None, failures=())
    page = written(tmp_path, representation_sections(found))
    assert "none" in page.words
    assert page.tags.count("svg") == 3


def test_bars_go_from_what_gains_most_to_what_loses_most(tmp_path: Path) -> None:
    values = {f"clip{i:03}": {RAW_LAST: 0.0, RAW_SAME: 1.0, ADAPTED: float(i)} for i in range(100)}
    values["broken"] = {RAW_SAME: 1.0, ADAPTED: math.nan}
    page = written(tmp_path, [bar_section("J&F", "J&F", values)])
    shown = [text for text in page.texts if re.fullmatch(r"clip\d{3}|broken", text)]
    kept = [*range(99, 79, -1), *range(18, -1, -1)]
    assert shown == [*(f"clip{i:03}" for i in kept), "broken"]
    assert "The first and the last 20 of 101 clips." in page.words
    assert "Sorted by adapted minus raw same layer." in page.words


def test_inconsistent_patches_are_red_and_others_as_they_were() -> None:
    shown = representation_sections(report())[-1].parts[0]
    assert isinstance(shown, Figure)
    data = re.findall(r"data:image/png;base64,\s*([^\"]+)", shown.content)
    first, second = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in data)
    first = first[::-1]  # which the page turns back
    height, width = second.shape[:2]
    assert (second[..., :3] == 100).all()
    for row, column in ((1, 1), (3, 1), (3, 3)):  # quarters of the frame
        assert (first[height * row // 4, width * column // 4, :3] == 100).all()
    red, green, _ = first[height // 4, 3 * width // 4, :3]
    assert red > 150 > 90 > green


def test_films_and_pictures_are_embedded(tmp_path: Path) -> None:
    for name in ("film.mp4", "still.PNG"):
        (tmp_path / name).write_bytes(name.encode())
    parts = [
        film(tmp_path / "film.mp4", NASTY),
        film(tmp_path / "still.PNG", "a still"),
    ]
    page = written(tmp_path, [Section("", parts)])
    kinds = [link.split(";")[0] for link in page.links]
    assert kinds == ["data:video/mp4", "data:image/png"]
    with pytest.raises(ValueError, match=r"got 'film.avi', which a report cannot show; use one of"):
        film(tmp_path / "film.avi", "no")


def test_what_is_missing_is_said_and_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path / "r.html", title="old")
    for module in ("jinja2", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[report\]"):
        write_page(path, title="new")
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[report\]"):
        bar_section("t", "l", {"a": {"b": 1.0}})
    assert "old" in path.read_text("utf-8")
