from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from cosettle_adapter.evaluation.consistency import cycle_accuracy, cycle_consistent
from cosettle_adapter.evaluation.representation_metrics import (
    Representation,
    RepresentationMetrics,
)
from einops import rearrange
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.representation import (
    RepresentationSettings,
    central_square,
    evaluate_representation,
)
from cosettle_adapter.evaluation.spectra import SpectrumStatistics
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    compare_features,
)
from cosettle_adapter.video import FrameSelection, open_frames

from helpers import write_video

QUICK = RepresentationSettings(frames=6, rate=12.5, size=48, crop=0.75, gap=2, trim=1)


def videos(count: int = 4, *, frames: int = 6, offset: float = 2.0) -> list[Tensor]:
    """Float64 clips of a 4 x 5 grid whose patches drift, each video with a place of its own."""
    generator = torch.Generator().manual_seed(0)
    clips = []
    for _ in range(count):
        place = offset * torch.randn(6, 1, 1, generator=generator)
        still = torch.randn(6, 4, 5, generator=generator)
        drift = 0.3 * torch.randn(frames, 6, 4, 5, generator=generator)
        clips.append((place + still + drift.cumsum(0)).double())
    return clips


def measure(clips: list[Tensor], **options: int) -> Representation:
    metrics = RepresentationMetrics(**options)
    for clip in clips:
        metrics.add(clip)
    return metrics.result()


def intra_by_hand(clip: Tensor, percentile: float, trim: int) -> float:
    tokens = rearrange(clip, "t c h w -> t (h w) c")
    inner = tokens[trim : len(tokens) - trim]
    pairs = [
        torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist")
        .amin(1).sort().values[:10].mean()
        for here, there in itertools.pairwise(inner)
    ]  # fmt: skip
    every = rearrange(tokens, "t n c -> (t n) c")
    radius = (every - every.mean(0)).norm(dim=1).quantile(percentile / 100)
    return float(torch.stack(pairs).mean() / (2 * radius))


def inter_by_hand(clips: list[Tensor], percentile: float) -> float:
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(42))[:8]
    middles = [rearrange(clip[len(clip) // 2], "c h w -> (h w) c")[chosen] for clip in clips]
    apart = [(a - b).norm(dim=1).mean() for a, b in itertools.combinations(middles, 2)]
    every = torch.cat(middles)
    radius = (every - every.mean(0)).norm(dim=1).quantile(percentile / 100)
    return float(torch.stack(apart).mean() / (2 * radius))


def rank_by_hand(clips: list[Tensor]) -> float:
    every = torch.cat([rearrange(clip[len(clip) // 2], "c h w -> (h w) c") for clip in clips])
    singular = torch.linalg.svdvals(every)
    shares = singular / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) / min(every.shape)


@pytest.mark.parametrize("trim", [0, 2])
def test_figures_equal_their_definitions(trim: int) -> None:
    clips = videos()
    found = measure(clips, trim=trim, gap=2)
    for percentile in (90.0, 95.0, 100.0):
        by_hand = [intra_by_hand(clip, percentile, trim) for clip in clips]
        assert [v.d_intra[percentile] for v in found.videos] == pytest.approx(by_hand, rel=1e-9)
        assert found.d_intra[percentile] == pytest.approx(sum(by_hand) / 4, rel=1e-9)
        assert found.d_inter[percentile] == pytest.approx(
            inter_by_hand(clips, percentile), rel=1e-9
        )
        rows = [video.d_inter[percentile] for video in found.videos]
        assert sum(rows) / 4 == pytest.approx(found.d_inter[percentile])
        assert len(set(rows)) == 4
    assert found.effective_rank == pytest.approx(rank_by_hand(clips), rel=1e-9)
    cycles = [cycle_accuracy(clip, gap=2) for clip in clips]
    assert found.cycle_accuracy == pytest.approx(sum(cycles) / 4)
    assert 0.1 < found.cycle_accuracy < 1
    margin = found.d_inter[90.0] - 3 * found.d_intra[90.0]
    assert found.margin(gamma=3, percentile=90) == pytest.approx(margin)
    with pytest.raises(ValueError, match="got percentile=50, but measured were 90, 95, 100"):
        found.margin(percentile=50)


@given(scale=st.floats(1e-2, 1e2), shift=st.floats(-3, 3), order=st.permutations(range(3)))
@hypothesis_settings(max_examples=15)
def test_neither_scale_nor_shift_nor_the_order_of_videos_matters(
    scale: float, shift: float, order: list[int]
) -> None:
    clips = videos(3)
    plain, moved = measure(clips), measure([clips[i] * scale + shift for i in order])
    assert moved.d_intra == pytest.approx(plain.d_intra, rel=1e-6)
    assert moved.d_inter == pytest.approx(plain.d_inter, rel=1e-6)
    assert moved.d_intra_raw == pytest.approx(plain.d_intra_raw * scale, rel=1e-6)
    assert moved.d_inter_raw == pytest.approx(plain.d_inter_raw * scale, rel=1e-6)
    assert [video.d_inter[95.0] for video in moved.videos] == pytest.approx(
        [plain.videos[i].d_inter[95.0] for i in order], rel=1e-6
    )


@given(seed=st.integers(0, 50), directions=st.integers(1, 6))
@hypothesis_settings(max_examples=20)
def test_effective_rank_of_equal_singular_values_is_their_number(
    seed: int, directions: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(20, 6, generator=generator).double()).Q[:, :directions]
    mixed = basis @ torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q[:directions]
    clip = rearrange(mixed, "(h w) c -> 1 c h w", h=4).expand(2, -1, -1, -1)
    # rounding must not leave anything of singular values that are zero
    assert measure([clip]).effective_rank == pytest.approx(directions / 6, rel=1e-6)
    few = rearrange(torch.eye(8, dtype=torch.float64)[:4], "(h w) c -> 1 c h w", h=2)
    assert measure([few.expand(2, -1, -1, -1)]).effective_rank == pytest.approx(1.0)


def test_videos_that_stand_still_are_together_and_equal_patches_have_no_diameter() -> None:
    found = measure([clip[:1].expand(4, -1, -1, -1) for clip in videos(3, offset=50.0)])
    assert found.d_intra[95.0] == 0
    assert found.cycle_accuracy == 1
    assert found.d_inter[100.0] > 0.6  # of what can be at most 1
    found = measure([*videos(2), torch.ones(6, 6, 4, 5, dtype=torch.float64)])
    assert math.isnan(found.videos[2].d_intra[95.0])
    expected = [video.d_intra[95.0] for video in found.videos[:2]]
    assert found.d_intra[95.0] == pytest.approx(sum(expected) / 2)
    assert math.isnan(measure(videos(1)).d_inter[95.0])


def test_results_on_the_way_and_what_a_video_leaves_behind() -> None:
    clips = videos(3, frames=40)
    metrics = RepresentationMetrics()
    with pytest.raises(FrameError, match="no video was added"):
        metrics.result()
    metrics.add(clips[0].half())
    assert metrics.result().d_intra[95.0] == pytest.approx(
        measure(clips[:1]).d_intra[95.0], rel=1e-2
    )
    metrics = RepresentationMetrics()
    for clip in clips[:2]:
        metrics.add(clip)
    assert metrics.result() == measure(clips[:2])
    metrics.add(clips[2], name="last")
    assert [video.name for video in metrics.result().videos] == ["video 0", "video 1", "last"]
    samples = metrics._samples
    assert sum(each.untyped_storage().nbytes() for each in samples) == 3 * 8 * 6 * 8


def test_what_does_not_fit_is_described_and_not_added() -> None:
    metrics = RepresentationMetrics(trim=2)
    metrics.add(videos(1)[0])
    with pytest.raises(GeometryError, match=r"\(6, 4, 4\) after a video of \(6, 4, 5\).*size="):
        metrics.add(torch.zeros(6, 6, 4, 4))
    with pytest.raises(FrameError, match="got 5 frames, expected at least 6"):
        metrics.add(videos(1, frames=5)[0])
    broken = videos(1)[0]
    broken[3, 0, 0, 0] = math.nan
    with pytest.raises(FrameError, match="features of lost hold values that are not finite"):
        metrics.add(broken, name="lost")
    assert len(metrics.result().videos) == 1
    for wrong in ({"gap": 0}, {"trim": -1}):
        with pytest.raises(ValueError, match=r"expected gap >= 1 and trim >= 0"):
            RepresentationMetrics(**wrong)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clips")
    return [
        write_video(root / f"{name}.mp4", frames=16, height=height, width=96, noisy=True)
        for name, height in (("a", 64), ("b", 80), ("c", 64))
    ]


def features_of(adapter: CoSettleAdapter, path: Path) -> dict[str, Tensor]:
    chunks = open_frames(path, FrameSelection(every=2, max_frames=6))
    frames = central_square(torch.cat([chunk.frames for chunk in chunks]), 0.75)
    return compare_features(adapter, frames, size=48)


def test_one_pass_gives_what_the_parts_give(
    tiny_adapter: CoSettleAdapter, clips: list[Path]
) -> None:
    done: list[tuple[int, int]] = []
    report = evaluate_representation(
        tiny_adapter, clips, QUICK, failures=2, batch_size=4, on_video=lambda *p: done.append(p)
    )
    assert list(report.results) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    assert done == [(1, 3), (2, 3), (3, 3)]
    metrics = {name: RepresentationMetrics(gap=2, trim=1) for name in report.results}
    statistics, shares = SpectrumStatistics(), {}
    for path in clips:
        features = features_of(tiny_adapter, path)
        statistics.add(features[RAW_SAME])
        for name, gathered in metrics.items():
            gathered.add(features[name], name=path.name)
        home = cycle_consistent(features[ADAPTED], gap=2)
        shares[path.name] = float(home.double().mean((1, 2)).min())
    for name, gathered in metrics.items():
        expected, found = gathered.result(), report.results[name]
        assert found.d_intra == pytest.approx(expected.d_intra, rel=1e-4)
        assert found.d_inter == pytest.approx(expected.d_inter, rel=1e-4)
        assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-4)
        assert [video.name for video in found.videos] == ["a.mp4", "b.mp4", "c.mp4"]
    assert report.spectrum is not None
    assert report.spectrum.videos == 3
    expected_spectrum = statistics.spectrum(tiny_adapter.projection.project)
    torch.testing.assert_close(report.spectrum.intra, expected_spectrum.intra, rtol=1e-3, atol=1e-6)
    assert [m.cycle_accuracy for m in report.failures] == pytest.approx(sorted(shares.values())[:2])
    for moment in report.failures:
        assert moment.cycle_accuracy == pytest.approx(shares[moment.video])
        assert moment.consistent.shape == (3, 3)
        assert moment.frames.shape[:2] == (2, 3)
        assert moment.frames.dtype == torch.uint8
        first, second = re.fullmatch(r"(.+) s to (.+) s", moment.when).groups()  # type: ignore[union-attr]
        assert float(second) - float(first) == pytest.approx(0.16)  # two frames at 12.5 a second


def test_a_video_that_cannot_be_used_does_not_lose_the_others(
    tiny_adapter: CoSettleAdapter, clips: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    short = write_video(tmp_path / "short.mp4", frames=4, height=64, width=64)
    report = evaluate_representation(
        tiny_adapter, [tmp_path / "broken.mp4", clips[0], short, clips[1]], QUICK
    )
    assert list(report.skipped) == ["broken.mp4", "short.mp4"]
    assert "got 2 frames at 12.5 a second, expected at least 4" in report.skipped["short.mp4"]
    assert all(len(result.videos) == 2 for result in report.results.values())
    alone = evaluate_representation(tiny_adapter, clips[:1], QUICK)
    assert alone.spectrum is None
    tiny_adapter.projection.linears[0].bias.fill_(math.nan)
    with pytest.raises(FrameError, match=r"features \(adapted\) hold values that are not finite"):
        evaluate_representation(tiny_adapter, clips, QUICK)


def test_image_folders_and_equal_names(
    tiny_adapter: CoSettleAdapter, clips: list[Path], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    folders = [tmp_path / parent / "clip" for parent in "xy"]
    for folder in folders:
        folder.mkdir(parents=True)
        for index in range(8):
            pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=generator)
            image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    report = evaluate_representation(tiny_adapter, [*folders, clips[0]], QUICK)
    names = [video.name for video in report.results[ADAPTED].videos]
    assert names == [str(folders[0]), str(folders[1]), "a.mp4"]
    assert report.results[ADAPTED].videos[0].frames == 6
    when = {moment.video: moment.when for moment in report.failures}
    assert when[names[0]].startswith("frame ")


@pytest.mark.parametrize(
    ("shape", "share", "box"),
    [((40, 60), 1.0, (0, 10, 40)), ((60, 40), 0.5, (20, 10, 20)), ((33, 33), 0.01, (16, 16, 1))],
)
def test_the_square_is_central(
    shape: tuple[int, int], share: float, box: tuple[int, int, int]
) -> None:
    frames = torch.arange(shape[0] * shape[1]).reshape(1, 1, *shape).expand(2, 3, -1, -1)
    top, left, side = box
    expected = frames[..., top : top + side, left : left + side]
    assert torch.equal(central_square(frames, share), expected)
    with pytest.raises(ValueError, match=r"crop of 1\.5"):
        central_square(frames, 1.5)
