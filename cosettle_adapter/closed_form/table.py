"""The solvers as rows of data, by the names that commands and configs call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from cosettle_adapter.closed_form.affine import AffineMap
from cosettle_adapter.closed_form.solvers import (
    Nuisance,
    centre,
    ridge_shrinkage,
    soft_threshold,
    surrogate,
    whiten,
)
from cosettle_adapter.closed_form.statistics import TokenStatistics


@dataclasses.dataclass(frozen=True)
class Solver:
    """A row of :data:`SOLVERS`.

    Attributes:
        name: what the command calls it.
        solve: statistics, strength and nuisance to map.
        formula: what it does, in a line, to be recorded beside a projection.
        strength: the default one.
        strengths: those worth trying.
    """

    name: str
    solve: Callable[[TokenStatistics, float, Nuisance], AffineMap]
    formula: str
    strength: float
    strengths: tuple[float, ...]


def _whitening(power: float, *, total: bool = False) -> Callable[..., AffineMap]:
    def solve(statistics: TokenStatistics, strength: float, nuisance: Nuisance) -> AffineMap:
        return whiten(statistics, strength, nuisance, power=power, total=total)

    return solve


_RIDGES = (0.1, 1.0, 10.0)

SOLVERS: Mapping[str, Solver] = {
    row.name: row
    for row in (
        Solver("centre", centre, "centre: c (x - mean)", 1.0, (1.0,)),
        Solver(
            "shrink",
            ridge_shrinkage,
            "centre, then shrink by the intra-video covariance: c r (S + r I)^-1 (x - mean)",
            1.0,
            _RIDGES,
        ),
        Solver(
            "whiten",
            _whitening(0.5),
            "centre, then damp by the intra-video covariance: c (S + r I)^(-1/2) (x - mean)",
            1.0,
            _RIDGES,
        ),
        Solver(
            "whiten-quarter",
            _whitening(0.25),
            "centre, then damp by the intra-video covariance: c (S + r I)^(-1/4) (x - mean)",
            1.0,
            _RIDGES,
        ),
        Solver(
            "whiten-total",
            _whitening(0.5, total=True),
            "PCA whitening: c (T + r I)^(-1/2) (x - mean), T the total covariance",
            1.0,
            _RIDGES,
        ),
        Solver(
            "whiten-total-quarter",
            _whitening(0.25, total=True),
            "half a PCA whitening: c (T + r I)^(-1/4) (x - mean), T the total covariance",
            1.0,
            _RIDGES,
        ),
        Solver(
            "soft-threshold",
            soft_threshold,
            "gains max(0, 1 - tau s), s the share of a direction's variance that is temporal",
            1.0,
            (0.5, 1.0, 2.0),
        ),
        Solver(
            "surrogate",
            surrogate,
            "the paper's quadratic surrogate: c lambda T (2 S + lambda T)^-1 (x - mean)",
            3.0,
            (0.3, 1.0, 3.0, 10.0),
        ),
    )
}
