from __future__ import annotations

import base64
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosettle_adapter.errors import MissingExtraError
from cosettle_adapter.evaluation import report
from cosettle_adapter.evaluation.report import Section, bar_section, write_page
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


def measured(videos: int = 3) -> RepresentationReport:
    results = {}
    for index, variant in enumerate((RAW_LAST, RAW_SAME, CENTRED, ADAPTED)):
        metrics = RepresentationMetrics()
        for video in range(videos):
            metrics.add(noise(3, 5, 4, 4, seed=9 * index + video), name=f"{NASTY}{video}")
        results[variant] = metrics.result()
    intra, gain = torch.linspace(2, 0, 8).double(), torch.linspace(0.1, 2, 8).double()
    spectrum = Spectrum(2, 1234, intra, torch.eye(8).double(), 3 * intra, 3 * intra, gain)
    return RepresentationReport(results, spectrum, (MOMENT,), {})


def written(tmp_path: Path, sections: list[Section], **options: object) -> str:
    path = tmp_path / "deep" / "r.html"
    write_page(path, title=f"model {NASTY}", sections=sections, **options)  # type: ignore[arg-type]
    return path.read_text("utf-8")


def test_a_whole_page_needs_nothing_else_and_escapes_all(tmp_path: Path) -> None:
    for name in ("film.mp4", "still.PNG"):
        (tmp_path / name).write_bytes(name.encode())
    films = [report.film(tmp_path / "film.mp4", NASTY), report.film(tmp_path / "still.PNG", NASTY)]
    table = report.Table("t", ("a", NASTY), [(NASTY, "1")], note=NASTY)
    sections = [
        *report.representation_sections(measured()),
        bar_section(NASTY, NASTY, {NASTY: {NASTY: 1.0}}),
        Section(NASTY, [table, NASTY, *films]),
        Section("empty", []),
        bar_section("none", "", {}),
    ]
    page = written(tmp_path, sections, lead=NASTY, facts={NASTY: NASTY})
    assert "<script" not in page
    assert page.count("&lt;script") >= 8
    assert page.count("<svg") == page.count("</svg>") == 7
    assert page.count("<h2") == 8, "sections without parts are left out"
    assert "data:video/mp4;base64," in page
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert all(link.startswith(("data:image/", "data:video/mp4;", "#")) for link in links)
    assert not re.search(r"(src|href|@import)[ =(]*[\"']?(https?:|//|/)", page)
    assert "75 % of the patches are cycle-consistent, those in red are not" in page
    assert "variance within videos is -1.000;" in page
    assert f"{measured().results[ADAPTED].figures['margin D']:.4f}" in page
    with pytest.raises(ValueError, match=r"got 'film.avi', which a report cannot show; use one of"):
        report.film(tmp_path / "film.avi", "no")


def test_a_single_video_has_nothing_to_be_apart_from_and_its_lost_patches_are_red(
    tmp_path: Path,
) -> None:
    sections = report.representation_sections(measured(1)._replace(spectrum=None))
    page = written(tmp_path, sections)
    assert "none" in page
    assert page.count("<svg") == 4
    shown = sections[-1].parts[0]
    assert isinstance(shown, report.Figure)
    data = re.findall(r"data:image/png;base64,\s*([^\"]+)", shown.content)
    first, second = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in data)
    first = first[::-1]  # which the page turns back
    height, width = second.shape[:2]
    assert (second[..., :3] == 100).all()
    for row, column in ((1, 1), (3, 1), (3, 3)):  # quarters of the frame
        assert (first[height * row // 4, width * column // 4, :3] == 100).all()
    red, green, _ = first[height // 4, 3 * width // 4, :3]
    assert red > 150 > 90 > green


def test_bars_go_from_what_gains_most_to_what_loses_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_MAX_BARS", 6)
    values = {f"clip{i}": {RAW_LAST: 0.0, RAW_SAME: 1.0, ADAPTED: float(i)} for i in range(9)}
    values["broken"] = {RAW_SAME: 1.0, ADAPTED: math.nan}
    page = written(tmp_path, [bar_section("J&F", "J&F", values)])
    shown = re.findall(r">(clip\d|broken)<", page)
    assert shown == [*(f"clip{i}" for i in (8, 7, 6, 1, 0)), "broken"]
    assert "The first and the last 3 of 10 clips." in page
    assert "Sorted by adapted minus raw same layer." in page


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
