from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from einops import einsum
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from cosettle_adapter.closed_form import StatisticsError, TokenStatistics
from cosettle_adapter.correspondence import corresponding_patches, soft_correspondences

COVARIANCES = ("mean", "covariance", "intra_covariance", "clip_covariance", "leakage_covariance")


def random_clips(count: int, *, width: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """Tokens (2, N, C) of two frames of clips that differ in length, mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for index in range(count):
        tokens = torch.randn(2, 5 + index % 4, width, generator=generator)
        clips.append(4 + (1 + index) * tokens + torch.randn(width, generator=generator))
    return clips


def collect(clips: Sequence[torch.Tensor], to: TokenStatistics | None = None) -> TokenStatistics:
    statistics = to or TokenStatistics(clips[0].shape[-1] if clips else 3)
    for here, there in clips:
        statistics.add_tokens(torch.cat([here, there]))
        statistics.add_pairs(here, there)
        statistics.add_soft_pairs(here, there, torch.rand(len(here), len(there)).fill_(0.25))
        statistics.add_views(here, there * 0.5)
        statistics.end_clip()
    return statistics


def assert_same(first: TokenStatistics, second: TokenStatistics, *, atol: float = 1e-10) -> None:
    for name in ("tokens", "pairs", "clips"):
        assert getattr(first, name) == getattr(second, name), name
    for name in COVARIANCES:
        found, expected = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-10)


def test_the_definitions() -> None:
    clips = [clip.double() for clip in random_clips(6, width=4)]
    statistics = TokenStatistics(4)
    for here, there in clips:
        statistics.add_tokens(here)
        statistics.add_pairs(here, there)
        statistics.add_views(here, there)
        statistics.end_clip()
        statistics.end_clip()  # a clip without tokens is none
    assert statistics.clips == 6
    tokens = torch.cat([here for here, _ in clips]).double()
    differences = torch.cat([here - there for here, there in clips]).double()
    means = torch.stack([here.double().mean(0) for here, _ in clips])
    torch.testing.assert_close(statistics.mean, tokens.mean(0))
    torch.testing.assert_close(statistics.covariance, torch.cov(tokens.T, correction=0))
    expected = einsum(differences, differences, "n c, n d -> c d") / (2 * len(differences))
    torch.testing.assert_close(statistics.intra_covariance, expected)
    torch.testing.assert_close(statistics.clip_covariance, torch.cov(means.T, correction=0))
    leakage = torch.cov(differences.T, correction=0) / 2
    torch.testing.assert_close(statistics.leakage_covariance, leakage)


def test_soft_pairs_are_the_weighted_sum_over_all_pairs() -> None:
    here, there = torch.randn(5, 3).double(), torch.randn(7, 3).double()
    weights = torch.rand(5, 7).double()
    statistics = TokenStatistics(3)
    statistics.add_soft_pairs(here, there, weights)
    difference = here[:, None] - there
    expected = einsum(weights, difference, difference, "n m, n m c, n m d -> c d")
    torch.testing.assert_close(statistics.intra_covariance, expected / (2 * weights.sum()))


def test_hard_pairs_are_the_limit_of_soft_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    here = torch.randn(8, 4, 5, generator=generator)
    there = torch.roll(here, (1, 2), dims=(1, 2)) + 0.05 * torch.randn(here.shape)
    hard, soft = TokenStatistics(8), TokenStatistics(8)
    hard.add_pairs(*corresponding_patches(here, there))
    soft.add_soft_pairs(*soft_correspondences(here, there, temperature=0.01))
    assert hard.pairs == soft.pairs == 20
    assert float(soft_correspondences(here, here.clone())[2].sum()) == 0, "a still frame"
    assert not len(corresponding_patches(here, here.clone())[0])
    torch.testing.assert_close(soft.intra_covariance, hard.intra_covariance, atol=1e-5, rtol=1e-2)


@given(split=st.integers(0, 8), seed=st.integers(0, 5))
def test_a_pass_continued_from_a_file_equals_one_pass(split: int, seed: int) -> None:
    clips = random_clips(9, seed=seed)
    first = TokenStatistics.from_tensors(load(save(collect(clips[:split]).to_tensors())))
    assert_same(collect(clips[split:], first), collect(clips))


def test_scaled_statistics_are_those_of_scaled_tokens() -> None:
    scale = torch.tensor([0.5, 2.0, 3.0])
    clips = random_clips(5)
    assert_same(collect(clips).scaled(scale), collect([clip * scale for clip in clips]), atol=1e-5)


def test_tensors_of_something_else_are_refused() -> None:
    with pytest.raises(StatisticsError, match="expected the tensors of token statistics"):
        TokenStatistics.from_tensors({"weight": torch.zeros(3)})
    tensors = collect(random_clips(2)).to_tensors()
    tensors["outer"] = torch.zeros(2, 2)
    with pytest.raises(StatisticsError, match=r"outer has shape \(2, 2\), expected \(3, 3\)"):
        TokenStatistics.from_tensors(tensors)
    with pytest.raises(ValueError, match=r"expected sums \(3,\) and \(3, 3\), got \(4,\)"):
        TokenStatistics(3).add_moments(9, torch.zeros(4), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"expected tokens \(N, 3\)"):
        TokenStatistics(3).add_tokens(torch.zeros(5, 4))


def test_nothing_collected_is_an_error() -> None:
    empty = TokenStatistics(3)
    missing = {
        "mean": "no tokens were collected",
        "intra_covariance": "no corresponding pairs were collected",
        "clip_covariance": "no whole clips were collected",
        "leakage_covariance": "no tokens with perturbed positions were collected",
    }
    for name, message in missing.items():
        with pytest.raises(StatisticsError, match=message):
            getattr(empty, name)
