from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cosettle_adapter import CoSettleAdapter, Projection
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.errors import FrameError
from cosettle_adapter.frames import render_clip
from cosettle_adapter.training.clips import find_clips, neighbouring_frames
from cosettle_adapter.training.fit import FitSettings, damping, fit_projection, mask_overlap
from cosettle_adapter.training.statistics import StatisticsError, TokenStatistics

from helpers import write_video

QUICK = FitSettings(layers=(2, 5), size=64, pairs=2, rendered=1)


def statistics(*, noise: float = 3.0) -> TokenStatistics:
    """Tokens whose first channel alone changes over time."""
    gathered = TokenStatistics(4)
    tokens = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) + 5
    later = tokens.clone()
    later[:, 0] += noise * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    gathered.add_tokens(tokens)
    gathered.add_pairs(tokens, later)
    return gathered


def test_damping_centres_and_shrinks_what_moves() -> None:
    gathered = statistics()
    weight, bias = damping(gathered, ridge=0.1)
    centred = gathered.mean.float() @ weight.T + bias
    torch.testing.assert_close(centred, torch.zeros(4), atol=1e-5, rtol=0)
    gains = weight.diagonal()
    assert float(gains[0]) < 0.5 * float(gains[1:].min())
    variance = weight.double() @ gathered.covariance @ weight.T.double()
    assert float(variance.diagonal().mean()) == pytest.approx(1.0, abs=1e-5)


def test_damping_solves_its_equation() -> None:
    gathered = statistics()
    weight, _ = damping(gathered, ridge=0.5)
    intra = gathered.intra_covariance
    ridged = intra + 0.5 * intra.diagonal().mean() * torch.eye(4).double()
    identity = weight.double() @ ridged @ weight.T.double()
    torch.testing.assert_close(identity / identity[1, 1], torch.eye(4).double(), atol=1e-5, rtol=0)


def test_an_infinite_ridge_only_centres() -> None:
    weight, _ = damping(statistics(), ridge=math.inf)
    torch.testing.assert_close(weight, weight[0, 0] * torch.eye(4))


def test_degenerate_statistics_are_errors_not_nan() -> None:
    still = TokenStatistics(4)
    tokens = torch.randn(10, 4)
    still.add_tokens(tokens)
    still.add_pairs(tokens, tokens)
    with pytest.raises(StatisticsError, match="the clips have no motion"):
        damping(still, ridge=0.1)
    flat = TokenStatistics(4)
    flat.add_tokens(torch.ones(10, 4))
    with pytest.raises(StatisticsError, match="all tokens are equal"):
        damping(flat, ridge=math.inf)
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        damping(statistics(), ridge=0)


def test_one_pair_of_frames_is_enough() -> None:
    few = TokenStatistics(8)
    few.add_tokens(torch.randn(5, 8))
    few.add_pairs(torch.randn(2, 8), torch.randn(2, 8))
    weight, bias = damping(few, ridge=0.1)
    assert bool(torch.isfinite(weight).all())
    assert bool(torch.isfinite(bias).all())


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.mkv", "more/c.mp4"):
        write_video(folder / name, frames=30, height=64, width=96, noisy=True)
    (folder / "notes.txt").write_text("not a clip")
    return folder


def test_clips_are_found_below_a_folder(clips: Path, tmp_path: Path) -> None:
    assert [path.name for path in find_clips(clips)] == ["a.mp4", "b.mkv", "c.mp4"]
    with pytest.raises(FrameError, match="is not a folder"):
        find_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrameError, match="no video files below"):
        find_clips(tmp_path / "empty")


def test_pairs_are_a_gap_apart(clips: Path) -> None:
    pairs = list(neighbouring_frames(clips / "a.mp4", pairs=3, gap=3))
    assert [tuple(pair.shape) for pair in pairs] == [(2, 3, 64, 96)] * 3
    bright = [
        [int((frame[0] > 180)[12:20].float().mean(0).gt(0.9).sum()) for frame in p] for p in pairs
    ]
    assert all(count >= 10 for pair in bright for count in pair)
    assert not torch.equal(pairs[0][0], pairs[0][1])


def test_a_fit_is_a_projection_that_loads(
    tiny_backbone: VisionTransformerBackbone, clips: Path, tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    result = fit_projection(
        tiny_backbone, find_clips(clips), QUICK, licence="MIT", data="squares",
        on_clip=lambda *progress: done.append(progress),
    )  # fmt: skip
    assert done[-1][0] == done[-1][1]
    config = result.projection.config
    assert result.scores.keys() == {2, 5}
    assert config.layers == (max(result.scores, key=lambda layer: result.scores[layer]),)
    assert (config.kind, config.licence, config.fit["data"]) == ("affine", "MIT", "squares")
    result.projection.save(tmp_path / "fitted")
    adapter = CoSettleAdapter(tiny_backbone, Projection.load(tmp_path / "fitted"))
    features = adapter(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert bool(torch.isfinite(features).all())


def test_a_fit_is_the_same_twice(tiny_backbone: VisionTransformerBackbone, clips: Path) -> None:
    first, second = (fit_projection(tiny_backbone, find_clips(clips), QUICK) for _ in range(2))
    assert first.projection.config == second.projection.config
    for name, tensor in first.projection.state_dict().items():
        assert torch.equal(tensor, second.projection.state_dict()[name])


def test_a_broken_clip_is_skipped_and_listed(
    tiny_backbone: VisionTransformerBackbone, clips: Path
) -> None:
    (clips / "broken.mp4").write_bytes(b"not a video")
    result = fit_projection(tiny_backbone, find_clips(clips), QUICK)
    assert [path.name for path in result.skipped] == ["broken.mp4"]
    assert result.projection.config.fit["skipped"] == ["broken.mp4"]


def test_no_readable_clip_is_an_error(
    tiny_backbone: VisionTransformerBackbone, tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(StatisticsError, match="no tokens were gathered"):
        fit_projection(tiny_backbone, [tmp_path / "broken.mp4"], QUICK)


def test_overlap_is_high_where_features_follow_the_object() -> None:
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (2, 3, 300, 400), dtype=torch.uint8, generator=generator)
    clip = render_clip(photos[0], cutout=photos[1], frames=4, size=(96, 128), seed=1)
    assert clip.object_mask is not None
    cells = torch.nn.functional.avg_pool2d(clip.object_mask[:, None].float(), 4)
    perfect = torch.cat([cells, 1 - cells], dim=1)
    assert mask_overlap(perfect, clip) > 0.7
    blind = torch.ones(4, 2, 24, 32)
    assert mask_overlap(blind, clip) < mask_overlap(perfect, clip)
    with pytest.raises(ValueError, match="no moving object"):
        mask_overlap(perfect, render_clip(photos[0], frames=4, size=(96, 128)))
