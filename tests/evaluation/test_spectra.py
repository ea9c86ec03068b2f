from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import einsum, rearrange

from cosettle_adapter import Projection, ProjectionConfig
from cosettle_adapter.closed_form import StatisticsError
from cosettle_adapter.correspondence import mutual_nearest
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.spectra import (
    Spectrum,
    SpectrumStatistics,
    directional_gain,
    spearman,
)

WIDTH = 6
NOISE = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)


def rotation(seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double()).Q


def known_videos(turn: torch.Tensor, *, videos: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Grids of far-apart patches that differ over time along the rows of ``turn`` by NOISE."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(videos):
        still = 6 * torch.randn(WIDTH, 8, 8, generator=generator).double()
        noise = torch.randn(5, WIDTH, 8, 8, generator=generator).double()
        along = einsum(noise, NOISE, turn, "t k h w, k, k c -> t c h w")
        clips.append(still + along)
    return clips


def gathered(clips: list[torch.Tensor]) -> SpectrumStatistics:
    statistics = SpectrumStatistics()
    for clip in clips:
        statistics.add(clip)
    return statistics


def test_known_directions_and_variances_are_found() -> None:
    turn = rotation()
    found = gathered(known_videos(turn)).spectrum(lambda tokens: tokens)
    assert found.videos == 12
    assert found.pairs > 3000  # all but a few of 12 x 4 x 64 patches find themselves
    torch.testing.assert_close(found.intra, NOISE.square(), rtol=0.08, atol=0)
    alignment = (found.directions @ turn.T).abs()
    assert float(alignment.diagonal().min()) > 0.97
    torch.testing.assert_close(found.inter, torch.full((WIDTH,), 36.0).double(), rtol=0.2, atol=0)
    torch.testing.assert_close(found.gain, torch.ones(WIDTH).double())


def test_covariances_equal_their_definitions() -> None:
    clips = known_videos(rotation(), videos=3)
    found = gathered(clips).spectrum(lambda tokens: tokens)
    differences = []
    for clip in clips:
        for here, there in itertools.pairwise(clip):
            mean = torch.stack([here, there]).mean((0, 2, 3))[:, None, None]
            pairs, _ = mutual_nearest(here - mean, there - mean)
            flat = [rearrange(frame, "c h w -> (h w) c") for frame in (here, there)]
            differences.append(flat[0][pairs[:, 0]] - flat[1][pairs[:, 1]])
    differences = torch.cat(differences)
    assert found.pairs == len(differences)
    intra = differences.T @ differences / (2 * len(differences))
    rebuilt = found.directions.T @ torch.diag(found.intra) @ found.directions
    torch.testing.assert_close(rebuilt, intra)
    middles = torch.stack([rearrange(clip[2], "c h w -> (h w) c") for clip in clips])
    inter = torch.stack([torch.cov(middles[:, position].T) for position in range(64)]).mean(0)
    torch.testing.assert_close(found.inter, torch.linalg.eigvalsh(inter).flip(0))
    along = found.directions @ inter @ found.directions.T
    torch.testing.assert_close(found.inter_along, along.diagonal())


def linear(weight: torch.Tensor) -> Projection:
    config = ProjectionConfig(
        backbone="none", fingerprint="", layers=(0,), norm=False, in_width=WIDTH,
        out_width=len(weight), kind="affine",
    )  # fmt: skip
    projection = Projection(config)
    projection.load_state_dict(
        {"linears.0.weight": weight.float(), "linears.0.bias": torch.ones(len(weight))}
    )
    return projection.requires_grad_(False)


@pytest.mark.parametrize(("power", "expected"), [(-0.5, -1.0), (0.5, 1.0)])
def test_a_projection_that_shrinks_what_changes_is_recognised(
    power: float, expected: float
) -> None:
    statistics = gathered(known_videos(rotation()))
    plain = statistics.spectrum(lambda tokens: tokens)
    weight = plain.directions.T @ torch.diag(plain.intra**power) @ plain.directions
    found = statistics.spectrum(linear(weight).project)
    torch.testing.assert_close(found.gain, found.intra**power, rtol=1e-4, atol=0)
    prediction = found.prediction
    assert prediction.spearman == pytest.approx(expected)
    assert prediction.holds == (expected < 0)
    if expected < 0:
        assert prediction.gain_high < 0.2 < 1 < prediction.gain_low


def test_a_projection_of_no_preference_predicts_nothing() -> None:
    statistics = gathered(known_videos(rotation()))
    found = statistics.spectrum(linear(3 * rotation(seed=9)).project)
    torch.testing.assert_close(found.gain, torch.full((WIDTH,), 3.0).double())
    torch.testing.assert_close(found.relative_gain, torch.ones(WIDTH).double())
    assert math.isnan(found.prediction.spearman)  # rounding is no order
    assert not found.prediction.holds


def test_large_variance_is_told_from_a_large_share_of_variance() -> None:
    # the direction that changes most over time also differs most between videos
    found = Spectrum(
        videos=2,
        pairs=9,
        intra=torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).double(),
        directions=torch.eye(5).double(),
        inter=torch.tensor([400.0, 3.0, 2.0, 2.0, 0.0]).double(),
        inter_along=torch.tensor([400.0, 2.0, 2.0, 3.0, 0.0]).double(),
        gain=torch.tensor([0.5, 0.1, 0.2, 0.3, 0.9]).double(),
    )
    # shares: 0.01, 1.5, 1, 1/3 and none
    assert found.prediction.spearman_share == pytest.approx(-1.0)
    assert found.prediction.spearman == pytest.approx(-0.4)
    scale = math.sqrt((0.25 + 0.01 + 0.04 + 0.09 + 0.81) / 5)
    assert found.prediction.gain_high == pytest.approx(0.5 / scale, rel=1e-4)
    assert found.prediction.gain_low == pytest.approx(0.9 / scale, rel=1e-4)


def test_gains_of_the_papers_head_are_those_of_small_steps() -> None:
    config = ProjectionConfig(
        backbone="none", fingerprint="", layers=(0,), norm=False, in_width=WIDTH, out_width=9
    )
    torch.manual_seed(0)
    head = Projection(config).double().requires_grad_(False)
    head.linears[0].weight.normal_()
    tokens = torch.randn(5, WIDTH).double()
    directions = rotation()
    step = 1e-5
    expected = []
    for direction in directions:
        ahead, back = (head.project(tokens + sign * step * direction) for sign in (1, -1))
        expected.append(((ahead - back) / (2 * step)).square().sum(1).mean().sqrt())
    gains = directional_gain(head.project, tokens, directions)
    torch.testing.assert_close(gains, torch.stack(expected), rtol=1e-6, atol=0)
    assert float(gains.std()) > 0.01


def test_one_token_is_enough_for_an_affine_projection() -> None:
    weight = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0))
    gains = directional_gain(linear(weight).project, torch.zeros(1, WIDTH), torch.eye(WIDTH))
    torch.testing.assert_close(gains, weight.norm(dim=0).double())


def test_what_does_not_fit_is_described() -> None:
    still = SpectrumStatistics()
    for _ in range(2):
        still.add(torch.randn(1, WIDTH, 4, 4).expand(3, -1, -1, -1))
    with pytest.raises(StatisticsError, match="no corresponding pairs were gathered"):
        still.spectrum(lambda tokens: tokens)
    statistics = SpectrumStatistics(gap=2)
    with pytest.raises(FrameError, match="got 2 frames, expected at least 3"):
        statistics.add(torch.randn(2, WIDTH, 4, 4))
    statistics.add(torch.randn(3, WIDTH, 4, 4))
    with pytest.raises(GeometryError, match=r"\(6, 4, 5\) after a video of \(6, 4, 4\)"):
        statistics.add(torch.randn(3, WIDTH, 4, 5))
    with pytest.raises(StatisticsError, match="got 1 videos, expected at least 2"):
        statistics.spectrum(lambda tokens: tokens)
    with pytest.raises(ValueError, match="gap=0"):
        SpectrumStatistics(gap=0)


def test_directions_that_few_patches_cannot_span_have_no_variance() -> None:
    statistics = gathered([torch.randn(2, 60, 3, 4) for _ in range(3)])
    found = statistics.spectrum(lambda tokens: tokens)
    assert bool((found.intra.diff() <= 0).all())
    assert float(found.intra[-1]) == 0.0


def test_spearman_shares_ranks_and_is_nan_for_constants() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([2.0, 1.0, 4.0, 4.0, 0.0])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(b, -b) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(5)))
