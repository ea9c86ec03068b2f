"""Projections without gradients: statistics of tokens, and the affine maps that follow from them.

Statistics of many clips and a solver give a projection to be stored (:data:`SOLVERS`); statistics
of a single clip settle that clip's features on top of any projection (:class:`Settler`).
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
