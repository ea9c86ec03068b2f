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
    compare_features,
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
from cosettle_adapter.analysis.statistics import (
    StatisticsError,
    TokenStatistics,
    corresponding_patches,
)

__all__ = [
    "ADAPTED",
    "CENTRED",
    "RAW_LAST",
    "RAW_SAME",
    "Prediction",
    "Representation",
    "RepresentationMetrics",
    "Spectrum",
    "SpectrumStatistics",
    "StatisticsError",
    "TokenStatistics",
    "VideoRepresentation",
    "comes_home",
    "compare_features",
    "corresponding_patches",
    "cycle_accuracy",
    "directional_gain",
    "neighbour_distance",
    "spearman",
    "spectrum",
    "tracking_error",
]
