"""Projections without gradient descent: affine maps computed from statistics of tokens.

A solver computes a projection from the statistics of many clips (:data:`SOLVERS`); a
:class:`Settler` refines the features of any projection with the statistics of a single clip.
"""

from typing import TYPE_CHECKING

from cosettle_adapter.closed_form.affine import AffineMap, apply_to_maps
from cosettle_adapter.closed_form.settling import Settler, settle_clip
from cosettle_adapter.errors import StatisticsError
from cosettle_adapter.imports import load_on_use

if TYPE_CHECKING:
    from cosettle_adapter.closed_form.solvers import (
        NUISANCES,
        SOLVERS,
        Nuisance,
        Solver,
        centre,
        layer_scale,
        nuisance_covariance,
        ridge_shrinkage,
        soft_threshold,
        solve_layers,
        surrogate,
        whiten,
    )
    from cosettle_adapter.closed_form.statistics import TokenStatistics

__all__ = [
    "NUISANCES", "SOLVERS", "AffineMap", "Nuisance", "Settler", "Solver", "StatisticsError",
    "TokenStatistics", "apply_to_maps", "centre", "layer_scale", "nuisance_covariance",
    "ridge_shrinkage", "settle_clip", "soft_threshold", "solve_layers", "surrogate", "whiten",
]  # fmt: skip

__getattr__ = load_on_use(
    __name__,
    statistics=["TokenStatistics"],
    solvers=[
        "NUISANCES", "SOLVERS", "Nuisance", "Solver", "centre", "layer_scale",
        "nuisance_covariance", "ridge_shrinkage", "soft_threshold", "solve_layers", "surrogate",
        "whiten",
    ],
)  # fmt: skip
