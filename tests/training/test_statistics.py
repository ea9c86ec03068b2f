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
from cosettle_adapter.training.statistics import Gathered, Gathering, gather

from helpers import write_video

PLAN = Gathering(sets=((2,), (2, 3)), size=48, pairs=2, leakage=True)


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


def assert_same(first: Gathered, second: Gathered) -> None:
    assert first.skipped.keys() == second.skipped.keys()
    assert first.statistics.keys() == second.statistics.keys()
    for blocks, statistics in first.statistics.items():
        other: TokenStatistics = second.statistics[blocks]
        for name in ("tokens", "pairs", "clips", "views"):
            assert getattr(statistics, name) == getattr(other, name)
        for name in ("mean", "covariance", "intra_covariance", "clip_covariance",
                     "leakage_covariance"):  # fmt: skip
            found, expected = getattr(statistics, name), getattr(other, name)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_one_encoder_pass_serves_all_sets_of_blocks(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    counts: list[int] = []
    found = gather(tiny_backbone, clips, PLAN, on_clips=counts.append)
    assert counts == [1] * 4
    assert [path.name for path in found.skipped] == ["broken.mp4"]
    single, joined = found.statistics[(2,)], found.statistics[(2, 3)]
    assert (single.width, joined.width) == (192, 384)
    assert single.clips == joined.clips == 3
    assert single.tokens == joined.tokens == single.views == 3 * 2 * 2 * 12
    torch.testing.assert_close(joined.covariance[:192, :192], single.covariance)


def test_shared_products_are_those_of_the_joined_tokens(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    sets = ((1,), (3, 1), (1, 2, 3))
    found = gather(tiny_backbone, clips[:1], Gathering(sets=sets, size=48, pairs=2))
    adapter = CoSettleAdapter.raw(tiny_backbone)
    frames = torch.cat(list(neighbouring_frames(clips[0], pairs=2, gap=3)))
    images = adapter.preprocess(frames, size=48)
    maps = tiny_backbone.intermediate_tokens(images, [1, 2, 3], norm=False)
    tokens = dict(zip((1, 2, 3), maps, strict=True))
    for blocks in sets:
        joined = torch.cat([tokens[block] for block in blocks], dim=1).double()
        flat = rearrange(joined, "t c h w -> (t h w) c")
        torch.testing.assert_close(found.statistics[blocks].mean, flat.mean(0))
        torch.testing.assert_close(
            found.statistics[blocks].covariance, torch.cov(flat.T, correction=0)
        )


@pytest.mark.parametrize("at_once", [1, 3])
def test_pairs_encoded_together_or_one_by_one_give_the_same(
    tiny_backbone: VisionTransformerBackbone,
    clips: list[Path],
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = dataclasses.replace(PLAN, pairs=4)
    together = gather(tiny_backbone, clips, plan)
    monkeypatch.setattr("cosettle_adapter.training.statistics._PAIRS_AT_ONCE", at_once)
    apart = gather(tiny_backbone, clips, plan)
    assert together.skipped == apart.skipped
    for blocks, statistics in together.statistics.items():
        other = apart.statistics[blocks]
        assert (statistics.pairs, statistics.clips) == (other.pairs, other.clips)
        for name in ("covariance", "intra_covariance", "clip_covariance", "leakage_covariance"):
            # the encoder's float32 sums depend on the size of its batch
            torch.testing.assert_close(
                getattr(statistics, name), getattr(other, name), atol=1e-4, rtol=1e-4
            )


def test_a_clip_that_changes_its_size_is_read_to_the_end(
    tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(48, 64), (48, 64), (64, 48), (48, 64)]
    pairs = [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8) for size in sizes]
    monkeypatch.setattr(
        "cosettle_adapter.training.statistics.neighbouring_frames", lambda *_, **__: iter(pairs)
    )
    plan = Gathering(sets=((2,),), size=48)
    found = gather(tiny_backbone, [Path("turned.mp4")], plan)
    assert not found.skipped
    assert found.statistics[(2,)].tokens == 4 * 2 * 12


def test_two_halves_are_one_pass(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    first = gather(tiny_backbone, clips[:2], PLAN)
    second = Gathered.from_bytes(gather(tiny_backbone, clips[:1:-1], PLAN).to_bytes())
    second.skipped = {clips[-1]: "broken"}
    first.merge(second)
    assert_same(first, gather(tiny_backbone, clips, PLAN))


def test_several_processes_give_the_same(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    counts: list[int] = []
    found = gather(tiny_backbone, clips, PLAN, workers=2, on_clips=counts.append)
    assert sum(counts) == len(clips)
    assert_same(found, gather(tiny_backbone, clips, PLAN))


def test_processes_are_for_the_cpu(
    tiny_backbone: VisionTransformerBackbone, clips: list[Path]
) -> None:
    with pytest.raises(ValueError, match="got 0 workers for a backbone on cpu"):
        gather(tiny_backbone, clips, PLAN, workers=0)


def test_still_clips_have_tokens_but_no_pairs(
    tiny_backbone: VisionTransformerBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8).expand(2, -1, -1, -1)
    monkeypatch.setattr(
        "cosettle_adapter.training.statistics.neighbouring_frames", lambda *_, **__: iter([frame])
    )
    for how in ("hard", "soft"):
        plan = Gathering(sets=((2,), (2, 3)), size=48, correspondences=how)  # type: ignore[arg-type]
        for statistics in gather(tiny_backbone, [Path("still.mp4")], plan).statistics.values():
            assert (statistics.tokens, statistics.pairs) == (24, 0)
