# shim: removed at integration
"""Measures under their old place."""

from __future__ import annotations

from cosettle_adapter.evaluation.keypoints import (  # noqa: F401
    BadjaAccuracy,
    Pck,
    badja_accuracy,
    joint_box_scale,
    pck,
)
from cosettle_adapter.evaluation.masks import (  # noqa: F401
    Summary,
    boundary_f,
    region_similarity,
    summarise,
)
from cosettle_adapter.evaluation.points import (  # noqa: F401
    Queries,
    TapVidMetrics,
    queries_first,
    queries_strided,
    tapvid_metrics,
)
from cosettle_adapter.evaluation.semantic import ConfusionMatrix  # noqa: F401
