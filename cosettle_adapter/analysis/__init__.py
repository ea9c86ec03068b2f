"""What a projection changed: how steadily patch features follow the things they are on.

One clip at a time (:func:`cycle_accuracy`, :func:`neighbour_distance`, :func:`tracking_error`),
over any number of videos (:class:`RepresentationMetrics`), and by direction (:func:`spectrum`).
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
    compare_features,
    feature_kinds,
    read_blocks,
)
from cosettle_adapter.analysis.consistency import (
    comes_home,
    cycle_accuracy,
    neighbour_distance,
    tracking_error,
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
    "RAW_LAST",
    "RAW_SAME",
    "SETTLED",
    "FeatureKind",
    "Prediction",
    "Representation",
    "RepresentationMetrics",
    "Spectrum",
    "SpectrumStatistics",
    "VideoRepresentation",
    "centred",
    "comes_home",
    "compare_features",
    "cycle_accuracy",
    "directional_gain",
    "feature_kinds",
    "neighbour_distance",
    "read_blocks",
    "spearman",
    "spectrum",
    "tracking_error",
]
