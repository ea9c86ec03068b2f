"""Does it track? Measures, data sets and protocols (extra ``[eval]``)."""

from __future__ import annotations

from cosettle_adapter.evaluation.davis import (
    DavisSequence,
    SequenceScores,
    davis_sequences,
    evaluate_sequence,
    mean_over_objects,
)
from cosettle_adapter.evaluation.metrics import (
    Summary,
    boundary_f,
    region_similarity,
    summarise,
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
