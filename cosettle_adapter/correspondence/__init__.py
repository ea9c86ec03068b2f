"""What feature maps say about which cell of one frame is which cell of another.

Everything here takes feature maps ``(C, h, w)`` of any origin and compares cells by cosine; it
needs torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosettle_adapter.correspondence.averaging import average_neighbours
from cosettle_adapter.correspondence.matching import mutual_nearest
from cosettle_adapter.lazy import load_on_use

if TYPE_CHECKING:
    from cosettle_adapter.correspondence.fusion import TemporalFusion, temporal_fusion
    from cosettle_adapter.correspondence.propagation import LabelPropagator, propagate_labels
    from cosettle_adapter.correspondence.protocols import PROTOCOLS, PropagationProtocol
    from cosettle_adapter.correspondence.tracking import Tracks, track_points

__all__ = [
    "PROTOCOLS",
    "LabelPropagator",
    "PropagationProtocol",
    "TemporalFusion",
    "Tracks",
    "average_neighbours",
    "mutual_nearest",
    "propagate_labels",
    "temporal_fusion",
    "track_points",
]

# closed forms and projections need no more
__getattr__ = load_on_use(
    __name__,
    {
        "PROTOCOLS": "cosettle_adapter.correspondence.protocols",
        "LabelPropagator": "cosettle_adapter.correspondence.propagation",
        "PropagationProtocol": "cosettle_adapter.correspondence.protocols",
        "TemporalFusion": "cosettle_adapter.correspondence.fusion",
        "Tracks": "cosettle_adapter.correspondence.tracking",
        "propagate_labels": "cosettle_adapter.correspondence.propagation",
        "temporal_fusion": "cosettle_adapter.correspondence.fusion",
        "track_points": "cosettle_adapter.correspondence.tracking",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
