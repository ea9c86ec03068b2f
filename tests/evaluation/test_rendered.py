from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import evaluate, rendered, rendered_clips, rendered_protocol


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photographs, and smaller clips of them."""
    monkeypatch.setattr(rendered, "SIZE", (64, 96))
    once = functools.lru_cache(maxsize=1)(rendered._rendered.__wrapped__)
    monkeypatch.setattr(rendered, "_rendered", once)
    for name in ("one", "two"):
        pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((300, 200)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_folder_of_photographs_is_scored_by_its_true_motion(
    photos: Path, tiny_adapter: CoSettleAdapter
) -> None:
    protocol = rendered_protocol(photos, clips=["one-zoom"])
    result = evaluate(protocol, tiny_adapter, size=(64, 96))
    assert list(result.clips) == ["one-zoom"]
    assert result.settings["drift"] == "true motion"
    names = {f"{what}@{gap}" for what in ("match", "drift") for gap in (1, 4, 8)}
    for figures in result.total.values():
        assert figures.keys() == names
        assert all(math.isfinite(value) for value in figures.values())
        assert 0 < figures["match@8"] <= figures["match@1"] <= 1
        assert 0 < figures["drift@1"] < figures["drift@8"]


def test_clips_are_the_same_whenever_they_are_read(photos: Path) -> None:
    clips = rendered_clips()
    assert len({clip.name for clip in clips}) == len(clips) == 12
    before = clips[0].read_annotations().frames.clone()
    assert clips[3].read_annotations().object_mask is not None
    assert torch.equal(clips[0].read_annotations().frames, before)
    assert clips[0].read_frame(3).shape == (64, 96, 3)


def test_what_cannot_be_rendered_is_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="no rendered clip 'one-tilt'"):
        rendered_clips(photos, clips=["one-tilt"])
    (photos / "one.png").rename(photos / "two.jpg")
    with pytest.raises(FrameError, match="several photographs for 'two-zoom'"):
        rendered_clips(photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrameError, match="empty holds no image files; found nothing"):
        rendered_clips(tmp_path / "empty")
