"""Draw features: PCA colours, masks, tracks and similarity maps (extra ``viz``)."""

from __future__ import annotations

from cosettle_adapter.visualization.drawing import colour_scale, distinct_colours
from cosettle_adapter.visualization.films import (
    comparison_picture,
    feature_panels,
    pca_film,
    side_by_side,
    time_slice,
    write_film,
)
from cosettle_adapter.visualization.overlays import (
    draw_tracks,
    overlay_masks,
    similarity_frames,
    similarity_maps,
    similarity_peaks,
)
from cosettle_adapter.visualization.pca import PCABasis, fit_pca, pca_frames

__all__ = [
    "PCABasis", "colour_scale", "comparison_picture", "distinct_colours", "draw_tracks",
    "feature_panels", "fit_pca", "overlay_masks", "pca_film", "pca_frames", "side_by_side",
    "similarity_frames", "similarity_maps", "similarity_peaks", "time_slice", "write_film",
]  # fmt: skip
