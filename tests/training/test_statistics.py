from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from einops import rearrange

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.closed_form import TokenStatistics
from cosettle_adapter.training.clips import neighbouring_frames
from cosettle_adapter.training.statistics import FitSettings, Statistics, collect_statistics

from helpers import write_video

SETS = ((2,), (2, 3))
PLAN = FitSettings(size=48, pairs=2, nuisance="intra+positions")


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    paths = [
        write_video(
            tmp_path / f"{name}.mp4", frames=12 + 3 * index, height=48, width=64, noisy=True
        )
        for index, name in enumerate("abc")
    ]
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    return [*paths, tmp_path / "broken.mp4"]


def assert_same(first: Statistics, second: Statistics) -> None:
    assert first.keys() == second.keys()
    for layers, statistics in first.items():
        other: TokenStatistics = second[layers]
        for name in ("tokens", "pairs", "clips", "views"):
            assert getattr(statistics, name) == getattr(other, name)
        for name in ("mean", "covariance", "intra_covariance", "clip_covariance",
                     "leakage_covariance"):  # fmt: skip
            found, expected = getattr(statistics, name), getattr(other, name)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_one_encoder_pass_serves_all_sets_of_layers(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    counts: list[int] = []
    found, skipped = collect_statistics(tiny_backbone, clips, SETS, PLAN, on_clips=counts.append)
    assert counts == [1] * 4
    assert [path.name for path in skipped] == ["broken.mp4"]
    single, joined = found[2,], found[2, 3]
    assert (single.width, joined.width) == (192, 384)
    assert single.clips == joined.clips == 3
    assert single.tokens == joined.tokens == single.views == 3 * 2 * 2 * 12
    torch.testing.assert_close(joined.covariance[:192, :192], single.covariance)


def test_shared_products_are_those_of_the_joined_tokens(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    sets = ((1,), (3, 1), (1, 2, 3))
    found, _ = collect_statistics(tiny_backbone, clips[:1], sets, FitSettings(size=48, pairs=2))
    adapter = CoSettleAdapter.raw(tiny_backbone)
    frames = torch.cat(list(neighbouring_frames(clips[0], pairs=2, gap=3)))
    images = adapter.preprocess(frames, size=48)
    maps = tiny_backbone.intermediate_tokens(images, [1, 2, 3], norm=False)
    tokens = dict(zip((1, 2, 3), maps, strict=True))
    for layers in sets:
        joined = torch.cat([tokens[layer] for layer in layers], dim=1).double()
        flat = rearrange(joined, "t c h w -> (t h w) c")
        torch.testing.assert_close(found[layers].mean, flat.mean(0))
        torch.testing.assert_close(found[layers].covariance, torch.cov(flat.T, correction=0))


@pytest.mark.parametrize("at_once", [1, 3])
def test_pairs_encoded_together_or_one_by_one_give_the_same(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path], at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = dataclasses.replace(PLAN, pairs=4)
    together, skipped = collect_statistics(tiny_backbone, clips, SETS, plan)
    monkeypatch.setattr("cosettle_adapter.training.statistics._PAIRS_AT_ONCE", at_once)
    apart, again = collect_statistics(tiny_backbone, clips, SETS, plan)
    assert skipped == again
    for layers, statistics in together.items():
        other = apart[layers]
        assert (statistics.pairs, statistics.clips) == (other.pairs, other.clips)
        for name in ("covariance", "intra_covariance", "clip_covariance", "leakage_covariance"):
            # the encoder's float32 sums depend on the size of its batch
            torch.testing.assert_close(
                getattr(statistics, name), getattr(other, name), atol=1e-4, rtol=1e-4
            )


def test_odd_clips(
    tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that changes its size is read to the end; a still one has tokens but no pairs."""
    frames: list[torch.Tensor] = []
    monkeypatch.setattr(
        "cosettle_adapter.training.statistics.neighbouring_frames", lambda *_, **__: iter(frames)
    )
    sizes = [(48, 64), (48, 64), (64, 48), (48, 64)]
    frames += [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8) for size in sizes]
    plan = FitSettings(size=48)
    found, skipped = collect_statistics(tiny_backbone, [Path("turned.mp4")], [(2,)], plan)
    assert not skipped
    assert found[2,].tokens == 4 * 2 * 12
    frames[:] = [frames[0][:1].expand(2, -1, -1, -1)]
    for how in ("hard", "soft"):
        plan = FitSettings(size=48, correspondences=how)  # type: ignore[arg-type]
        found, _ = collect_statistics(tiny_backbone, [Path("still.mp4")], SETS, plan)
        assert all((each.tokens, each.pairs) == (24, 0) for each in found.values())


def test_several_processes_give_the_same(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    counts: list[int] = []
    found, skipped = collect_statistics(
        tiny_backbone, clips, SETS, PLAN, workers=2, on_clips=counts.append
    )
    assert sum(counts) == len(clips)
    alone, same = collect_statistics(tiny_backbone, clips, SETS, PLAN)
    assert_same(found, alone)
    assert skipped.keys() == same.keys()
    with pytest.raises(ValueError, match="got 0 workers for a backbone on cpu"):
        collect_statistics(tiny_backbone, clips, SETS, PLAN, workers=0)
