"""Does it track? Measures, data sets and protocols (extra ``[eval]``)."""

from __future__ import annotations

from cosettle_adapter.evaluation.davis import DavisSequence, davis_sequences
from cosettle_adapter.evaluation.metrics import (
    Summary,
    boundary_f,
    region_similarity,
    summarise,
)
from cosettle_adapter.evaluation.segmentation import (
    SequenceScores,
    evaluate_sequence,
    mean_over_objects,
)

__all__ = [
    "DavisSequence",
    "SequenceScores",
    "Summary",
    "boundary_f",
    "davis_sequences",
    "evaluate_sequence",
    "mean_over_objects",
    "region_similarity",
    "summarise",
]
