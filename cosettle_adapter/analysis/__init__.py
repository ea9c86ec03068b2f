# shim: removed at integration
"""Folded into :mod:`cosettle_adapter.evaluation`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cosettle_adapter.evaluation import variants
from cosettle_adapter.evaluation.consistency import (
    cycle_accuracy,
    tracking_error,
)
from cosettle_adapter.evaluation.consistency import (
    cycle_consistent as comes_home,
)
from cosettle_adapter.evaluation.drift import (
    GAPS,
    Correspondence,
    drift_by_gap,
    match_accuracy,
    mutual_correspondences,
    temporal_drift,
    true_correspondences,
)
from cosettle_adapter.evaluation.representation_metrics import (
    Representation,
    RepresentationMetrics,
    VideoRepresentation,
)
from cosettle_adapter.evaluation.spectra import (
    Prediction,
    Spectrum,
    SpectrumStatistics,
    directional_gain,
    spearman,
)
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    SETTLED,
    centred,
    centred_layer,
)
from cosettle_adapter.evaluation.variants import FeatureVariant as FeatureKind
from cosettle_adapter.evaluation.variants import guide_variant as guide_kind
from cosettle_adapter.evaluation.variants import read_layers as read_blocks


def feature_kinds(adapter: Any, *, beside: Any = None, **options: Any) -> list[FeatureKind]:
    """See :func:`cosettle_adapter.evaluation.variants.feature_variants`."""
    return variants.feature_variants(adapter, **({"baselines": beside} | options))


def compare_features(
    adapter: Any, frames: Tensor, *, kinds: Any = None, **options: Any
) -> dict[str, Tensor]:
    """See :func:`cosettle_adapter.evaluation.variants.compare_features`."""
    return variants.compare_features(adapter, frames, **({"variants": kinds} | options))


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
    "temporal_drift",
    "tracking_error",
    "true_correspondences",
]
