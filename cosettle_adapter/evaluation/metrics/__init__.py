"""Published measures of masks, label maps, joints and points; NumPy and SciPy underneath.

Everything is a share in [0, 1]; tables multiply by 100.
"""

from __future__ import annotations

from cosettle_adapter.evaluation.metrics.badja import BadjaAccuracy, badja_accuracy
from cosettle_adapter.evaluation.metrics.keypoints import Pck, joint_box_scale, pck
from cosettle_adapter.evaluation.metrics.masks import (
    MaskScores,
    Summary,
    boundary_f,
    j_and_f,
    region_similarity,
    summarise,
)
from cosettle_adapter.evaluation.metrics.points import (
    Queries,
    TapVidMetrics,
    mean_over_videos,
    queries_first,
    queries_strided,
    tapvid_metrics,
)
from cosettle_adapter.evaluation.metrics.semantic import ConfusionMatrix

__all__ = [
    "BadjaAccuracy",
    "ConfusionMatrix",
    "MaskScores",
    "Pck",
    "Queries",
    "Summary",
    "TapVidMetrics",
    "badja_accuracy",
    "boundary_f",
    "j_and_f",
    "joint_box_scale",
    "mean_over_videos",
    "pck",
    "queries_first",
    "queries_strided",
    "region_similarity",
    "summarise",
    "tapvid_metrics",
]
