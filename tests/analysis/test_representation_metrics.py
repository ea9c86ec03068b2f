from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cosettle_adapter.analysis import Representation, RepresentationMetrics, cycle_accuracy
from cosettle_adapter.errors import FrameError, GeometryError


def videos(count: int = 4, *, frames: int = 6, seed: int = 0, offset: float = 2.0) -> list:
    """Float64 clips of a 4 x 5 grid whose patches drift, each video with a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(count):
        place = offset * torch.randn(6, 1, 1, generator=generator)
        still = torch.randn(6, 4, 5, generator=generator)
        drift = 0.3 * torch.randn(frames, 6, 4, 5, generator=generator)
        clips.append((place + still + drift.cumsum(0)).double())
    return clips


def measure(clips: list, **options: object) -> Representation:
    metrics = RepresentationMetrics(**options)  # type: ignore[arg-type]
    for clip in clips:
        metrics.add(clip)
    return metrics.result()


def intra_by_hand(clip: torch.Tensor, percentile: float, trim: int = 0) -> float:
    tokens = rearrange(clip, "t c h w -> t (h w) c")
    inner = tokens[trim : len(tokens) - trim]
    kept = inner.shape[1] // 2
    pairs = [
        torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist")
        .amin(1).sort().values[:kept].mean()
        for here, there in itertools.pairwise(inner)
    ]  # fmt: skip
    every = rearrange(tokens, "t n c -> (t n) c")
    radius = (every - every.mean(0)).norm(dim=1).quantile(percentile / 100)
    return float(torch.stack(pairs).mean() / (2 * radius))


def inter_by_hand(clips: list, percentile: float, seed: int = 42) -> float:
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:8]
    middles = [rearrange(clip[len(clip) // 2], "c h w -> (h w) c")[chosen] for clip in clips]
    apart = [(a - b).norm(dim=1).mean() for a, b in itertools.combinations(middles, 2)]
    every = torch.cat(middles)
    radius = (every - every.mean(0)).norm(dim=1).quantile(percentile / 100)
    return float(torch.stack(apart).mean() / (2 * radius))


def rank_by_hand(clips: list) -> float:
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
        expected = inter_by_hand(clips, percentile)
        assert found.d_inter[percentile] == pytest.approx(expected, rel=1e-9)
    assert found.effective_rank == pytest.approx(rank_by_hand(clips), rel=1e-9)
    cycles = [cycle_accuracy(clip, gap=2) for clip in clips]
    assert found.cycle_accuracy == pytest.approx(sum(cycles) / 4)
    assert 0.1 < found.cycle_accuracy < 1


def test_margin_is_apart_minus_gamma_times_together() -> None:
    found = measure(videos())
    expected = found.d_inter[90.0] - 3 * found.d_intra[90.0]
    assert found.margin(gamma=3, percentile=90) == pytest.approx(expected)
    assert found.margin() == pytest.approx(found.d_inter[95.0] - found.d_intra[95.0])
    with pytest.raises(ValueError, match="got percentile=50, but measured were 90, 95, 100"):
        found.margin(percentile=50)


def test_the_videos_mean_distances_have_the_whole_as_their_mean() -> None:
    found = measure(videos(5))
    for percentile, whole in found.d_inter.items():
        rows = [video.d_inter[percentile] for video in found.videos]
        assert sum(rows) / 5 == pytest.approx(whole)
        assert len(set(rows)) == 5


@given(scale=st.floats(1e-2, 1e2), shift=st.floats(-3, 3))
@hypothesis_settings(max_examples=15)
def test_normalised_distances_know_neither_scale_nor_shift(scale: float, shift: float) -> None:
    clips = videos(3)
    plain, moved = measure(clips), measure([clip * scale + shift for clip in clips])
    assert moved.d_intra == pytest.approx(plain.d_intra, rel=1e-6)
    assert moved.d_inter == pytest.approx(plain.d_inter, rel=1e-6)
    assert moved.d_intra_raw == pytest.approx(plain.d_intra_raw * scale, rel=1e-6)
    assert moved.d_inter_raw == pytest.approx(plain.d_inter_raw * scale, rel=1e-6)


@given(order=st.permutations(range(4)), chunk=st.integers(1, 25))
@hypothesis_settings(max_examples=15)
def test_neither_the_order_of_videos_nor_the_chunk_matters(order: list[int], chunk: int) -> None:
    clips = videos(4)
    plain = measure(clips)
    other = measure([clips[i] for i in order], chunk=chunk)
    assert other.d_intra == pytest.approx(plain.d_intra, rel=1e-9)
    assert other.d_inter == pytest.approx(plain.d_inter, rel=1e-9)
    assert other.effective_rank == pytest.approx(plain.effective_rank, rel=1e-9)
    assert [v.d_inter for v in other.videos] == [
        pytest.approx(plain.videos[i].d_inter, rel=1e-9) for i in order
    ]


@given(seed=st.integers(0, 50), directions=st.integers(1, 6))
@hypothesis_settings(max_examples=20)
def test_effective_rank_of_equal_singular_values_is_their_number(
    seed: int, directions: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(20, 6, generator=generator).double()).Q[:, :directions]
    mixed = basis @ torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q[:directions]
    clip = rearrange(mixed, "(h w) c -> 1 c h w", h=4).expand(2, -1, -1, -1)
    # singular values that are zero must not leak in through rounding
    assert measure([clip]).effective_rank == pytest.approx(directions / 6, rel=1e-6)


def test_fewer_tokens_than_channels_are_a_share_of_the_tokens() -> None:
    clip = rearrange(torch.eye(8, dtype=torch.float64)[:4], "(h w) c -> 1 c h w", h=2)
    assert measure([clip.expand(2, -1, -1, -1)]).effective_rank == pytest.approx(1.0)


def test_videos_that_stand_still_and_far_apart() -> None:
    clips = [clip[:1].expand(4, -1, -1, -1) for clip in videos(3, offset=50.0)]
    found = measure(clips)
    assert found.d_intra[95.0] == 0
    assert found.cycle_accuracy == 1
    assert found.d_inter[100.0] > 0.6  # of what can be at most 1


def test_equal_patches_have_no_diameter_and_are_left_out_of_the_mean() -> None:
    clips = [*videos(2), torch.ones(6, 6, 4, 5, dtype=torch.float64)]
    found = measure(clips)
    assert math.isnan(found.videos[2].d_intra[95.0])
    expected = [video.d_intra[95.0] for video in found.videos[:2]]
    assert found.d_intra[95.0] == pytest.approx(sum(expected) / 2)


def test_one_video_has_nothing_to_be_apart_from() -> None:
    found = measure(videos(1))
    assert math.isnan(found.d_inter[95.0])
    assert found.d_intra[95.0] > 0


def test_memory_does_not_grow_with_the_length_of_videos() -> None:
    short, long = RepresentationMetrics(), RepresentationMetrics()
    short.add(videos(1, frames=3)[0])
    long.add(videos(1, frames=40)[0])

    def kept(metrics: RepresentationMetrics) -> int:
        tensors = [value for value in vars(metrics).values() if isinstance(value, torch.Tensor)]
        lists = [value for value in vars(metrics).values() if isinstance(value, list)]
        tensors += [item for value in lists for item in value if isinstance(item, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert kept(short) == kept(long)
    before = kept(long)
    long.add(videos(1, frames=40)[0])
    assert kept(long) - before == 8 * 6 * 8  # positions, channels, bytes


def test_results_may_be_asked_for_on_the_way() -> None:
    clips = videos(3)
    metrics = RepresentationMetrics()
    for clip in clips[:2]:
        metrics.add(clip)
    assert metrics.result() == measure(clips[:2])
    metrics.add(clips[2], name="last")
    assert metrics.result().d_inter == measure(clips).d_inter
    assert [video.name for video in metrics.result().videos] == ["video 0", "video 1", "last"]


def test_half_precision_is_taken() -> None:
    clips = videos(3)
    found = measure([clip.half() for clip in clips])
    assert found.d_intra[95.0] == pytest.approx(measure(clips).d_intra[95.0], rel=1e-2)


def test_what_does_not_fit_is_said_and_not_added() -> None:
    metrics = RepresentationMetrics(trim=2)
    with pytest.raises(FrameError, match="no video was added"):
        metrics.result()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0"),
        ({"positions": 0}, "positions=0"),
        ({"gap": 0}, "gap=0"),
        ({"trim": -1}, "trim=-1"),
        ({"percentiles": (50.0, 101.0)}, r"percentiles=\(50\.0, 101\.0\), expected some in"),
        ({"percentiles": ()}, r"percentiles=\(\)"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepresentationMetrics(**options)  # type: ignore[arg-type]
