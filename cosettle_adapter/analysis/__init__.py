"""What a projection changed: how steadily patch features follow the things they are on.

One clip at a time (:func:`temporal_drift`, :func:`cycle_accuracy`, :func:`tracking_error`), over
any number of videos (:class:`RepresentationMetrics`), and by direction (:func:`spectrum`).
"""

from __future__ import annotations

from cosettle_adapter.analysis.comparison import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    SETTLED,
    FeatureKind,
    centred,
    centred_layer,
    compare_features,
    feature_kinds,
    guide_kind,
    read_blocks,
)
from cosettle_adapter.analysis.consistency import (
    comes_home,
    cycle_accuracy,
    tracking_error,
)
from cosettle_adapter.analysis.drift import (
    GAPS,
    Correspondence,
    drift_by_gap,
    match_accuracy,
    mutual_correspondences,
    temporal_drift,
    true_correspondences,
)
from cosettle_adapter.analysis.gain import directional_gain
from cosettle_adapter.analysis.prediction import Prediction, Spectrum, spearman
from cosettle_adapter.analysis.representation import (
    Representation,
    RepresentationMetrics,
    VideoRepresentation,
)
from cosettle_adapter.analysis.spectra import SpectrumStatistics, spectrum

__all__ = [
    "ADAPTED",
    "CENTRED",
    "GAPS",
    "RAW_LAST",
    "RAW_SAME",
    "SETTLED",
    "Correspondence",
    "FeatureKind",
    "Prediction",
    "Representation",
    "RepresentationMetrics",
    "Spectrum",
    "SpectrumStatistics",
    "VideoRepresentation",
    "centred",
    "centred_layer",
    "comes_home",
    "compare_features",
    "cycle_accuracy",
    "directional_gain",
    "drift_by_gap",
    "feature_kinds",
    "guide_kind",
    "match_accuracy",
    "mutual_correspondences",
    "read_blocks",
    "spearman",
    "spectrum",
    "temporal_drift",
    "tracking_error",
    "true_correspondences",
]
