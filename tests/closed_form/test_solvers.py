from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cosettle_adapter.closed_form import (
    NUISANCES,
    SOLVERS,
    AffineMap,
    Solver,
    StatisticsError,
    TokenStatistics,
    centre,
    layer_scale,
    nuisance_covariance,
    ridge_shrinkage,
    soft_threshold,
    solve_layers,
    surrogate,
    whiten,
)

WIDTH = 4
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def collected(*, noise: float = 3.0, seed: int = 0, turn: bool = False) -> TokenStatistics:
    """Tokens whose first channel alone changes over time; in other coordinates with ``turn``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(4000, WIDTH, generator=generator) + 5
    later = tokens.clone()
    later[:, 0] += noise * torch.randn(4000, generator=generator)
    later[:, 1:] += 0.2 * torch.randn(4000, WIDTH - 1, generator=generator)
    if turn:
        mix = torch.randn(WIDTH, WIDTH, generator=generator)
        tokens, later = tokens @ mix, later @ mix
    statistics = TokenStatistics(WIDTH)
    for part, moved in zip(tokens.split(500), later.split(500), strict=True):
        statistics.add_tokens(part)
        statistics.add_tokens(moved)
        statistics.add_pairs(part, moved)
        statistics.add_views(part, moved)
        statistics.end_clip()
    return statistics


def matrix(found: AffineMap) -> torch.Tensor:
    """The map's matrix, scaled so that its largest entry is 1."""
    return found.weight / found.weight.abs().max()


@every_solver
@pytest.mark.parametrize("nuisance", NUISANCES)
def test_every_solver_centres_and_gives_unit_variance(solver: Solver, nuisance: str) -> None:
    statistics = collected(turn=True)
    for strength in solver.strengths:
        found = solver.solve(statistics, strength, nuisance)  # type: ignore[arg-type]
        torch.testing.assert_close(
            found(statistics.mean), torch.zeros(WIDTH).double(), atol=1e-9, rtol=0
        )
        variance = found.weight @ statistics.covariance @ found.weight.T
        assert float(variance.diagonal().mean()) == pytest.approx(1.0, abs=1e-9)


def test_whitening_solves_its_equation() -> None:
    statistics = collected(turn=True)
    weight = whiten(statistics, 0.5).weight
    intra = statistics.intra_covariance
    ridged = intra + 0.5 * intra.diagonal().mean() * torch.eye(WIDTH).double()
    identity = weight @ ridged @ weight.T
    torch.testing.assert_close(identity / identity[1, 1], torch.eye(WIDTH).double())
    quarter = matrix(whiten(statistics, 0.5, power=0.25))
    both = AffineMap(quarter @ quarter, quarter[0])
    torch.testing.assert_close(matrix(both), matrix(AffineMap(weight, weight[0])))
    weight = whiten(statistics, 1e-9, total=True).weight
    covariance = weight @ statistics.covariance @ weight.T
    torch.testing.assert_close(covariance, torch.eye(WIDTH).double(), atol=1e-6, rtol=0)


def test_shrinkage_minimises_its_objective() -> None:
    statistics = collected(turn=True)
    intra = statistics.intra_covariance
    ridge = 2.0 * intra.diagonal().mean()
    found = ridge_shrinkage(statistics, 2.0).weight
    eye = torch.eye(WIDTH).double()
    weight = found / found.trace() * (ridge * torch.linalg.inv(intra + ridge * eye)).trace()
    weight.requires_grad_(True)
    loss = (weight @ intra @ weight.T).trace() + ridge * (weight - eye).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-8, rtol=0)


def test_the_surrogate_is_minimised_exactly() -> None:
    statistics = collected(turn=True)
    intra, total, mean = statistics.intra_covariance, statistics.covariance, statistics.mean
    found = surrogate(statistics, 1.5)
    direct = 1.5 * total @ torch.linalg.inv(2 * intra + 1.5 * total)
    scale = found.weight.norm() / direct.norm()
    torch.testing.assert_close(found.weight, scale * direct)

    weight = direct.clone().requires_grad_(True)
    bias = (-direct @ mean).requires_grad_(True)
    # E|W d|^2 + lambda E|W x + b - (x - m)|^2 over the moments, d the difference of a pair
    off = weight @ mean + bias
    change = weight - torch.eye(WIDTH).double()
    loss = 2 * (weight @ intra @ weight.T).trace()
    loss = loss + 1.5 * ((change @ total @ change.T).trace() + off.square().sum())
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)


def test_soft_thresholding_at_one_is_the_wiener_filter() -> None:
    statistics = collected(noise=0.5, turn=True)
    total, intra = statistics.covariance, statistics.intra_covariance
    wiener = (total - intra) @ torch.linalg.inv(total)
    found = soft_threshold(statistics, 1.0).weight
    torch.testing.assert_close(found * (wiener.norm() / found.norm()), wiener)
    noisy = collected(turn=True)  # beyond, the worst direction is turned off
    ranks = [torch.linalg.matrix_rank(soft_threshold(noisy, tau).weight) for tau in (0.5, 2)]
    assert list(map(int, ranks)) == [WIDTH, WIDTH - 1]


def test_no_damping_is_centring_and_nuisances_add_up() -> None:
    statistics = collected()
    expected = centre(statistics)
    for solve, nothing in (
        (ridge_shrinkage, math.inf),
        (whiten, math.inf),
        (soft_threshold, 0.0),
        (surrogate, math.inf),
    ):
        found = solve(statistics, nothing)
        torch.testing.assert_close(found.weight, expected.weight)
        torch.testing.assert_close(found.bias, expected.bias)
    intra = nuisance_covariance(statistics)
    torch.testing.assert_close(
        nuisance_covariance(statistics, "intra+clips"), intra + statistics.clip_covariance
    )
    torch.testing.assert_close(
        nuisance_covariance(statistics, "intra+positions"), intra + statistics.leakage_covariance
    )
    with pytest.raises(ValueError, match="unknown nuisance 'inter'; expected one of intra, "):
        nuisance_covariance(statistics, "inter")  # type: ignore[arg-type]


@every_solver
@hypothesis_settings(max_examples=15)
@given(tokens=st.integers(2, 6), rank=st.integers(1, 3), seed=st.integers(0, 9))
def test_a_deficient_corpus_gives_a_usable_projection(
    solver: Solver, tokens: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 12, generator=generator)
    here, there = torch.randn(2, tokens, rank, generator=generator) @ basis
    statistics = TokenStatistics(12)
    statistics.add_tokens(torch.cat([here, there]))
    statistics.add_pairs(here, there)
    for strength in solver.strengths:
        found = solver.solve(statistics, strength, "intra")
        assert bool(torch.isfinite(found.weight).all() and torch.isfinite(found.bias).all())
        assert float(found(here.double()).std()) > 0.1


@every_solver
def test_degenerate_statistics_are_errors_not_nan(solver: Solver) -> None:
    flat = TokenStatistics(WIDTH)
    tokens = torch.ones(10, WIDTH) / 3
    flat.add_tokens(tokens)
    flat.add_pairs(tokens, tokens + torch.randn(10, WIDTH))
    with pytest.raises(StatisticsError, match="all tokens are equal"):
        solver.solve(flat, solver.strength, "intra")
    with pytest.raises(StatisticsError, match=r"no (tokens|corresponding pairs) were collected"):
        solver.solve(TokenStatistics(WIDTH), solver.strength, "intra")
    still, tokens = TokenStatistics(WIDTH), torch.randn(10, WIDTH)
    still.add_tokens(tokens)
    still.add_pairs(tokens, tokens)
    if solver.name != "centre" and "total" not in solver.name:
        with pytest.raises(StatisticsError, match="the clips have no motion"):
            solver.solve(still, solver.strength, "intra")


def test_strengths_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match="strength must be positive, got 0"):
        whiten(collected(), 0)
    with pytest.raises(ValueError, match="strength must be positive, got -1"):
        surrogate(collected(), -1)
    with pytest.raises(ValueError, match="strength must be finite and not negative, got inf"):
        soft_threshold(collected(), math.inf)


# Several layers solved together ---------------------------------------------------------------

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
