"""What feature maps say about which cell of one frame is which cell of another.

Everything here takes feature maps ``(C, h, w)`` of any origin and compares cells by cosine; it
needs torch alone.
"""

from __future__ import annotations

from cosettle_adapter.correspondence.matching import mutual_nearest
from cosettle_adapter.correspondence.propagation import LabelPropagator, propagate_labels
from cosettle_adapter.correspondence.protocols import PROTOCOLS, PropagationProtocol
from cosettle_adapter.correspondence.tracking import Tracks, track_points

__all__ = [
    "PROTOCOLS",
    "LabelPropagator",
    "PropagationProtocol",
    "Tracks",
    "mutual_nearest",
    "propagate_labels",
    "track_points",
]
