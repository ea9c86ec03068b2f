from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.training.statistics import StatisticsError, TokenStatistics


def gather(tokens: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor]) -> TokenStatistics:
    statistics = TokenStatistics(tokens.shape[1])
    statistics.add_tokens(tokens)
    statistics.add_pairs(*pairs)
    return statistics


def test_the_definitions() -> None:
    tokens = torch.randn(50, 6, dtype=torch.float64) + 3
    here, there = torch.randn(2, 40, 6, dtype=torch.float64)
    statistics = gather(tokens, (here, there))
    torch.testing.assert_close(statistics.mean, tokens.mean(0))
    torch.testing.assert_close(statistics.covariance, torch.cov(tokens.T, correction=0))
    expected = sum(torch.outer(d, d) for d in here - there) / 80
    torch.testing.assert_close(statistics.intra_covariance, expected)


def test_intra_covariance_recovers_the_covariance_of_independent_draws() -> None:
    root = torch.randn(4, 4, dtype=torch.float64)
    draws = torch.randn(2, 100_000, 4, dtype=torch.float64) @ root
    statistics = gather(draws[0], (draws[0], draws[1]))
    torch.testing.assert_close(statistics.intra_covariance, root.T @ root, atol=0.1, rtol=0.05)


@given(split=st.integers(0, 30), seed=st.integers(0, 5))
def test_merging_parts_equals_one_pass(split: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(30, 3, generator=generator)
    pairs = torch.randn(2, 30, 3, generator=generator)
    whole = gather(tokens, (pairs[0], pairs[1]))
    first = gather(tokens[:split], (pairs[0, :split], pairs[1, :split]))
    first.merge(gather(tokens[split:], (pairs[0, split:], pairs[1, split:])))
    for name in ("mean", "covariance", "intra_covariance"):
        torch.testing.assert_close(getattr(first, name), getattr(whole, name), atol=1e-10, rtol=0)


def test_nothing_gathered_is_an_error() -> None:
    empty = TokenStatistics(3)
    with pytest.raises(StatisticsError, match="no tokens were gathered"):
        empty.mean  # noqa: B018
    with pytest.raises(StatisticsError, match="no corresponding pairs were gathered"):
        empty.intra_covariance  # noqa: B018
