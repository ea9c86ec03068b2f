"""Correspondence between the patches of video frames: matching, fusion, labels, tracks.

Everything here takes feature maps ``(C, h, w)`` of any origin and compares patches by cosine.
"""

from typing import TYPE_CHECKING

from cosettle_adapter.correspondence.fusion import (
    FusionMode,
    TemporalFusion,
    average_neighbours,
    temporal_fusion,
)
from cosettle_adapter.correspondence.matching import (
    corresponding_patches,
    mutual_nearest,
    soft_correspondences,
)
from cosettle_adapter.imports import load_on_use

if TYPE_CHECKING:
    from cosettle_adapter.correspondence.propagation import (
        PROTOCOLS,
        LabelPropagator,
        PropagationProtocol,
        propagate_labels,
    )
    from cosettle_adapter.correspondence.tracking import Tracks, track_points

__all__ = [
    "PROTOCOLS", "FusionMode", "LabelPropagator", "PropagationProtocol", "TemporalFusion",
    "Tracks", "average_neighbours", "corresponding_patches", "mutual_nearest",
    "propagate_labels", "soft_correspondences", "temporal_fusion", "track_points",
]  # fmt: skip

__getattr__ = load_on_use(
    __name__,
    propagation=["PROTOCOLS", "LabelPropagator", "PropagationProtocol", "propagate_labels"],
    tracking=["Tracks", "track_points"],
)
