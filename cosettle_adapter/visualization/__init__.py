"""Pictures of features: PCA colours, captioned panels, films (extra ``[viz]``)."""

from __future__ import annotations

from cosettle_adapter.visualization.films import write_film
from cosettle_adapter.visualization.panels import feature_panels, side_by_side, stills
from cosettle_adapter.visualization.pca import PCABasis, fit_pca, pca_frames

__all__ = [
    "PCABasis",
    "feature_panels",
    "fit_pca",
    "pca_frames",
    "side_by_side",
    "stills",
    "write_film",
]
