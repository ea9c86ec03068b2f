"""Several layers solved together."""

from __future__ import annotations

import pytest
import torch

from cosettle_adapter.closed_form import (
    StatisticsError,
    TokenStatistics,
    centre,
    layer_scale,
    solve_layers,
    whiten,
)

WIDTHS = (4, 6)


def two_layers(*, scale: float = 50.0) -> tuple[TokenStatistics, torch.Tensor]:
    """Statistics and tokens; the second layer's are larger."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, 10, generator=generator).double() + 3
    tokens[:, 4:] *= scale
    later = tokens + 0.2 * tokens.std(0) * torch.randn(500, 10, generator=generator)
    statistics = TokenStatistics(10)
    statistics.add_tokens(tokens)
    statistics.add_pairs(tokens, later)
    return statistics, tokens


def test_one_layer_is_left_to_the_solver() -> None:
    statistics, _ = two_layers()
    found = solve_layers(statistics, [10], whiten, out_width=10)
    assert torch.equal(found.weight, whiten(statistics).weight)


def test_the_scale_of_a_layer_does_not_matter() -> None:
    features = []
    for scale in (1.0, 50.0):
        statistics, tokens = two_layers(scale=scale)
        found = solve_layers(statistics, WIDTHS, whiten, out_width=10)(tokens)
        features.append(found @ found.T)
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=1e-6)
    variance = torch.tensor([1.0, 3.0, 400.0])
    scaled = variance * layer_scale(variance, (2, 1)).square()
    assert float(scaled[:2].sum()) == pytest.approx(float(scaled[2]))


def test_the_axes_of_most_variance_are_kept() -> None:
    statistics, tokens = two_layers()
    full = solve_layers(statistics, WIDTHS, centre, out_width=10)(tokens)
    kept = solve_layers(statistics, WIDTHS, centre, out_width=7)(tokens)
    assert kept.shape == (500, 7)
    torch.testing.assert_close(kept.mean(0), torch.zeros(7).double(), atol=1e-9, rtol=0)
    covariance = torch.cov(kept.T, correction=0)
    best = torch.linalg.eigvalsh(torch.cov(full.T, correction=0)).flip(0)[:7]
    values = covariance.diagonal()
    torch.testing.assert_close(values / values.sum(), best / best.sum())
    assert float(values.mean()) == pytest.approx(1.0)
    assert float(covariance.fill_diagonal_(0).abs().max()) < 1e-9


def test_more_axes_than_data_has_are_finite() -> None:
    statistics, tokens = TokenStatistics(10), torch.randn(3, 10)
    statistics.add_tokens(tokens)
    statistics.add_pairs(tokens[:1], tokens[1:2])
    found = solve_layers(statistics, WIDTHS, whiten, out_width=6)
    assert bool(torch.isfinite(found.weight).all() and torch.isfinite(found.bias).all())


def test_layers_that_do_not_fit_are_errors() -> None:
    statistics, tokens = two_layers()
    with pytest.raises(ValueError, match=r"layers with 10 channels in total, got \[4, 5\]"):
        solve_layers(statistics, (4, 5), centre, out_width=4)
    flat = TokenStatistics(10)
    tokens[:, 4:] = 1
    flat.add_tokens(tokens)
    with pytest.raises(StatisticsError, match="all tokens of layer 1 of 2 are equal"):
        solve_layers(flat, WIDTHS, centre, out_width=4)
