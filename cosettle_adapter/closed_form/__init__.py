"""Projections without gradients: statistics of tokens, and the affine maps that follow from them.

Statistics of many clips and a solver give a projection to be stored (:data:`SOLVERS`); statistics
of a single clip settle that clip's features on top of any projection (:class:`Settler`).
"""

from cosettle_adapter.closed_form.affine import AffineMap, layer_scale, solve_layers
from cosettle_adapter.closed_form.settling import Settler, apply_to_maps, settle_clip
from cosettle_adapter.closed_form.solvers import (
    NUISANCES,
    SOLVERS,
    Nuisance,
    Solver,
    centre,
    nuisance_covariance,
    ridge_shrinkage,
    soft_threshold,
    surrogate,
    whiten,
)
from cosettle_adapter.closed_form.statistics import TokenStatistics
from cosettle_adapter.correspondence import corresponding_patches, soft_correspondences
from cosettle_adapter.errors import StatisticsError

__all__ = [
    "NUISANCES",
    "SOLVERS",
    "AffineMap",
    "Nuisance",
    "Settler",
    "Solver",
    "StatisticsError",
    "TokenStatistics",
    "apply_to_maps",
    "centre",
    "corresponding_patches",
    "layer_scale",
    "nuisance_covariance",
    "ridge_shrinkage",
    "settle_clip",
    "soft_correspondences",
    "soft_threshold",
    "solve_layers",
    "surrogate",
    "whiten",
]
