from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import save
from einops import einsum, rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor
from torchvision import transforms

from cosettle_adapter import CoSettleAdapter, Projection, ProjectionConfig
from cosettle_adapter.correspondence import mutual_nearest
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation import variants
from cosettle_adapter.evaluation.drift import cycle_consistent
from cosettle_adapter.evaluation.representation import (
    Representation,
    RepresentationMetrics,
    RepresentationSettings,
    _central_square,
    evaluate_representation,
)
from cosettle_adapter.evaluation.spectra import SpectrumStatistics, directional_gain
from cosettle_adapter.video import FrameSelection, open_frames

from helpers import noise, write_video

QUICK = RepresentationSettings(frames=6, rate=12.5, size=48, gap=2, trim=1)


def videos(count: int = 4, *, frames: int = 6, offset: float = 2.0) -> list[Tensor]:
    """Float64 clips of a 4 x 5 grid whose patches drift, each video with a place of its own."""
    clips = []
    for seed in range(count):
        place = offset * noise(6, 1, 1, seed=seed)
        drift = 0.3 * noise(frames, 6, 4, 5, seed=seed)
        clips.append((place + noise(6, 4, 5, seed=seed + 9) + drift.cumsum(0)).double())
    return clips


def measure(clips: list[Tensor], **options: int) -> Representation:
    metrics = RepresentationMetrics(**options)
    for clip in clips:
        metrics.add(clip)
    return metrics.result()


def diameter(patches: Tensor) -> float:
    return 2 * float((patches - patches.mean(0)).norm(dim=1).quantile(0.95))


def cycle_by_hand(clip: Tensor) -> float:
    """The released ``compute_cycle_accuracy``, walk by walk; for lengths that 20 divides."""
    hits = []
    for percent in (25, 35, 45, 55, 65):
        ends = [clip[len(clip) * share // 100].numpy() for share in (percent, percent + 15)]
        here, there = (
            [
                frame[:, row : row + 2, column : column + 2].mean((1, 2))
                for row in range(0, frame.shape[1] - 1, 2)
                for column in range(0, frame.shape[2] - 1, 2)
            ]
            for frame in ends
        )
        for start, token in enumerate(here):
            forth = special.softmax([token @ other / 0.03 for other in there])
            back = [special.softmax([other @ home / 0.03 for home in here]) for other in there]
            hits.append(np.argmax(forth @ np.array(back)) == start)
    return float(np.mean(hits))


def intra_by_hand(clip: Tensor, trim: int) -> float:
    tokens = rearrange(clip, "t c h w -> t (h w) c")
    inner = tokens[trim : len(tokens) - trim]
    exact = "donot_use_mm_for_euclid_dist"
    closest = [
        torch.cdist(here, there, compute_mode=exact).amin(1).sort().values[:10].mean()
        for here, there in itertools.pairwise(inner)
    ]
    return float(torch.stack(closest).mean()) / diameter(rearrange(tokens, "t n c -> (t n) c"))


@pytest.mark.parametrize("trim", [0, 2])
def test_figures_equal_their_definitions(trim: int) -> None:
    clips = [0.1 * clip for clip in videos(frames=20)]
    found = measure(clips, trim=trim, gap=2)
    by_hand = [intra_by_hand(clip, trim) for clip in clips]
    assert [video.d_intra for video in found.videos] == pytest.approx(by_hand, rel=1e-9)
    assert found.d_intra == pytest.approx(sum(by_hand) / 4, rel=1e-9)
    middles = [rearrange(clip[len(clip) // 2], "c h w -> (h w) c") for clip in clips]
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(42))[:8]
    apart = [(a - b)[chosen].norm(dim=1).mean() for a, b in itertools.combinations(middles, 2)]
    sample = torch.cat([middle[chosen] for middle in middles])  # 32, of which 30 are counted
    radius = (sample - sample.mean(0)).norm(dim=1).sort().values[29]
    d_inter = float(torch.stack(apart).mean() / (2 * radius))
    assert found.d_inter == pytest.approx(d_inter, rel=1e-9)
    assert sum(video.d_inter for video in found.videos) / 4 == pytest.approx(d_inter)
    assert found.figures["margin D"] == pytest.approx(d_inter - found.d_intra)
    singular = torch.linalg.svdvals(torch.cat(middles))
    assert found.effective_rank == pytest.approx(math.exp(stats.entropy(singular)) / 6, rel=1e-9)
    cycles = [float(cycle_consistent(clip, gap=2).float().mean()) for clip in clips]
    assert found.cycle_consistency == pytest.approx(sum(cycles) / 4)
    walks = [cycle_by_hand(clip) for clip in clips]
    assert [video.cycle_accuracy for video in found.videos] == pytest.approx(walks)
    assert found.cycle_accuracy == pytest.approx(sum(walks) / 4)
    assert 0.1 < found.cycle_accuracy < 0.9
    assert 0.1 < found.cycle_consistency < 1


@given(seed=st.integers(0, 50), directions=st.integers(1, 6))
@settings(max_examples=12)
def test_effective_rank_of_equal_singular_values_is_their_number(
    seed: int, directions: int
) -> None:
    basis = torch.linalg.qr(noise(20, 6, seed=seed).double()).Q[:, :directions]
    mixed = basis @ torch.linalg.qr(noise(6, 6, seed=seed + 1).double()).Q[:directions]
    clip = rearrange(mixed, "(h w) c -> 1 c h w", h=4).expand(2, -1, -1, -1)
    # rounding must not leave anything of singular values that are zero
    assert measure([clip]).effective_rank == pytest.approx(directions / 6, rel=1e-6)


def test_videos_that_stand_still_are_together_and_equal_patches_have_no_diameter() -> None:
    found = measure([clip[:1].expand(4, -1, -1, -1) for clip in videos(3, offset=50.0)])
    assert (found.d_intra, found.cycle_consistency) == (0, 1)
    assert found.d_inter > 0.6  # of what can be about 1
    found = measure([*videos(2), torch.ones(6, 6, 4, 5, dtype=torch.float64)])
    assert math.isnan(found.videos[2].d_intra)
    assert found.d_intra == pytest.approx(sum(video.d_intra for video in found.videos[:2]) / 2)
    assert math.isnan(measure(videos(1)).d_inter)


def test_what_does_not_fit_is_described_and_not_added() -> None:
    metrics = RepresentationMetrics(trim=2)
    metrics.add(videos(1)[0])
    for error, message, clip in (
        (GeometryError, r"\(6, 4, 4\) after a video of .*size=", torch.zeros(6, 6, 4, 4)),
        (FrameError, "got 5 frames, expected at least 6", videos(1, frames=5)[0]),
        (FrameError, "hold values that are not finite", videos(1)[0] * math.nan),
    ):
        with pytest.raises(error, match=message):
            metrics.add(clip)
    assert len(metrics.result().videos) == 1
    with pytest.raises(ValueError, match=r"expected gap >= 1 and trim >= 0"):
        RepresentationMetrics(gap=0)


WIDTH = 6
SPREAD = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)
TURN = torch.linalg.qr(noise(WIDTH, WIDTH, seed=3).double()).Q


def gathered(count: int = 12) -> tuple[SpectrumStatistics, list[Tensor]]:
    """Grids of far-apart patches that differ over time along the rows of TURN by SPREAD."""
    statistics, clips = SpectrumStatistics(), []
    for seed in range(count):
        own = noise(5, WIDTH, 8, 8, seed=seed + 50).double()
        along = einsum(own, SPREAD, TURN, "t k h w, k, k c -> t c h w")
        clips.append(6 * noise(WIDTH, 8, 8, seed=seed).double() + along)
        statistics.add(clips[-1])
    return statistics, clips


def identity(tokens: Tensor) -> Tensor:
    return tokens


def test_covariances_equal_their_definitions() -> None:
    statistics, clips = gathered(3)
    found, steps = statistics.spectrum(identity), []
    for here, there in itertools.chain.from_iterable(map(itertools.pairwise, clips)):
        mean = torch.stack([here, there]).mean((0, 2, 3))[:, None, None]
        pairs, _ = mutual_nearest(here - mean, there - mean)
        flat = [rearrange(frame, "c h w -> (h w) c") for frame in (here, there)]
        steps.append(flat[0][pairs[:, 0]] - flat[1][pairs[:, 1]])
    step = torch.cat(steps)
    assert found.pairs == len(step)
    rebuilt = found.directions.T @ torch.diag(found.intra) @ found.directions
    torch.testing.assert_close(rebuilt, step.T @ step / (2 * len(step)))
    middles = torch.stack([rearrange(clip[2], "c h w -> (h w) c") for clip in clips])
    inter = torch.stack([torch.cov(middles[:, position].T) for position in range(64)]).mean(0)
    torch.testing.assert_close(found.inter, torch.linalg.eigvalsh(inter).flip(0))
    along = found.directions @ inter @ found.directions.T
    torch.testing.assert_close(found.inter_along, along.diagonal())


def head(**changes: object) -> Projection:
    known = {"backbone": "none", "fingerprint": "", "layers": (0,), "norm": False}
    config = ProjectionConfig(in_width=WIDTH, **known, **changes)  # type: ignore[arg-type]
    return Projection(config).requires_grad_(False)


def linear(weight: Tensor) -> Projection:
    projection = head(out_width=len(weight), kind="affine")
    bias = torch.ones(len(weight))
    projection.load_state_dict({"linears.0.weight": weight.float(), "linears.0.bias": bias})
    return projection


@pytest.mark.parametrize(("power", "expected"), [(-0.5, -1.0), (0.5, 1.0), (0.0, math.nan)])
def test_a_projection_that_shrinks_what_changes_is_recognised(
    power: float, expected: float
) -> None:
    statistics, _ = gathered(6)
    plain = statistics.spectrum(identity)
    weight = 3 * plain.directions.T @ torch.diag(plain.intra**power) @ plain.directions
    found = statistics.spectrum(linear(weight).project)
    torch.testing.assert_close(found.gain, 3 * found.intra**power, rtol=1e-4, atol=0)
    assert found.correlations[0] == pytest.approx(expected, nan_ok=True)  # rounding is no order
    assert found.relative_gain.square().mean() == pytest.approx(1)
    share = stats.spearmanr(found.intra / found.inter_along, found.gain).statistic
    assert found.correlations[1] == pytest.approx(float(share)) or power == 0


def test_gains_of_the_papers_head_are_those_of_small_steps() -> None:
    torch.manual_seed(0)
    projection = head(out_width=9).double()
    projection.linears[0].weight.normal_()
    tokens, step, expected = noise(5, WIDTH).double(), 1e-5, []
    for direction in TURN:
        ahead, back = (projection.project(tokens + sign * step * direction) for sign in (1, -1))
        expected.append(((ahead - back) / (2 * step)).square().sum(1).mean().sqrt())
    gains = directional_gain(projection.project, tokens, TURN)
    torch.testing.assert_close(gains, torch.stack(expected), rtol=1e-6, atol=0)
    assert float(gains.std()) > 0.01


def test_directions_that_few_patches_cannot_span_have_no_variance() -> None:
    statistics = SpectrumStatistics()
    for seed in range(3):
        statistics.add(noise(2, 60, 3, 4, seed=seed))
    found = statistics.spectrum(identity)
    assert bool((found.intra.diff() <= 0).all())
    assert float(found.intra[-1]) == 0.0


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clips")
    return [
        write_video(root / f"{name}.mp4", frames=12, height=height, width=96, noisy=True)
        for name, height in (("a", 64), ("b", 80), ("c", 64))
    ]


def test_frames_are_cropped_as_the_released_code_does(clips: list[Path]) -> None:
    crop = transforms.Compose([transforms.Resize(55), transforms.CenterCrop(48)])
    for path in clips:
        frames = torch.cat([chunk.frames for chunk in open_frames(path)])
        pictures = [crop(transforms.functional.to_pil_image(frame)) for frame in frames]
        expected = torch.stack([transforms.functional.pil_to_tensor(each) for each in pictures])
        apart = (_central_square(frames, 48).int() - expected.int()).abs()
        # Pillow rounds weights to more bits than torch, so values near a half may differ
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.02


def test_one_pass_gives_what_the_parts_give(
    tiny_adapter: CoSettleAdapter, clips: list[Path]
) -> None:
    done: list[tuple[int, int]] = []
    report = evaluate_representation(
        tiny_adapter, clips, QUICK, batch_size=4, on_video=lambda *given: done.append(given)
    )
    names = [variants.RAW_LAST, variants.RAW_SAME, variants.CENTRED, variants.ADAPTED]
    assert list(report.results) == names
    assert done == [(1, 3), (2, 3), (3, 3)]
    metrics = {name: RepresentationMetrics(gap=2, trim=1) for name in names}
    statistics, shares = SpectrumStatistics(), {}
    for path in clips:
        chunks = open_frames(path, FrameSelection(every=2, max_frames=6))
        frames = torch.cat([chunk.frames for chunk in chunks])
        square = _central_square(frames, 48)
        features = variants.compare_features(tiny_adapter, square, size=48)
        statistics.add(features[variants.RAW_SAME])
        for name, collected in metrics.items():
            collected.add(features[name], name=path.name)
        home = cycle_consistent(features[variants.ADAPTED], gap=2)
        shares[path.name] = float(home.double().mean((1, 2)).min())
    for name, collected in metrics.items():
        expected, found = collected.result(), report.results[name]
        assert found[1:] == pytest.approx(expected[1:], rel=1e-6)
        assert [video.name for video in found.videos] == ["a.mp4", "b.mp4", "c.mp4"]
    assert report.spectrum is not None
    spectrum = statistics.spectrum(tiny_adapter.projection.project)
    torch.testing.assert_close(report.spectrum.intra, spectrum.intra, rtol=1e-6, atol=1e-6)
    assert [m.cycle_consistency for m in report.failures] == pytest.approx(sorted(shares.values()))
    for moment in report.failures:
        assert moment.cycle_consistency == pytest.approx(shares[moment.video])
        assert moment.consistent.shape == (3, 3)
        assert moment.frames.shape[:2] == (2, 3)
        assert moment.frames.dtype == torch.uint8
        first, second = re.fullmatch(r"(.+) s to (.+) s", moment.when).groups()  # type: ignore[union-attr]
        assert float(second) - float(first) == pytest.approx(0.16)  # two frames at 12.5 a second


def test_image_folders_equal_names_and_videos_that_cannot_be_used(
    tiny_adapter: CoSettleAdapter, clips: list[Path], tmp_path: Path
) -> None:
    broken, folders = tmp_path / "broken.mp4", [tmp_path / parent / "clip" for parent in "xy"]
    broken.write_bytes(b"not a video")
    short = write_video(tmp_path / "short.mp4", frames=4, height=64, width=64)
    for folder, t in itertools.product(folders, range(6)):
        pixels = np.random.default_rng(t).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        save(folder / f"{t}.png", pixels)
    report = evaluate_representation(tiny_adapter, [broken, *folders, short, clips[0]], QUICK)
    assert list(report.skipped) == ["broken.mp4", "short.mp4"]
    assert "got 2 frames at 12.5 per second, expected at least 4" in report.skipped["short.mp4"]
    for result in report.results.values():
        assert [v.name for v in result.videos] == [*map(str, folders), "a.mp4"]
    assert result.videos[0].frames == 6
    when = {moment.video: moment.when for moment in report.failures}
    assert when[str(folders[0])].startswith("frame ")
    assert evaluate_representation(tiny_adapter, clips[:1], QUICK).spectrum is None
    tiny_adapter.projection.linears[0].bias.fill_(math.nan)
    with pytest.raises(FrameError, match=r"features hold values that are not finite"):
        evaluate_representation(tiny_adapter, clips, QUICK)
