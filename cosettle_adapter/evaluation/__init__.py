"""Data sets, measures, benchmarks and reports (extra ``[eval]``).

:func:`evaluate` runs a benchmark, such as :func:`davis_protocol`, on every variant of an adapter's
features. The lists of clips and the measures can also be used on their own.
"""

from __future__ import annotations

import warnings
from typing import Any

from cosettle_adapter.evaluation.clips import Clip
from cosettle_adapter.evaluation.joint_clips import (
    BADJA_JOINTS,
    JHMDB_JOINTS,
    Joints,
    badja_clips,
    badja_protocol,
    jhmdb_clips,
    jhmdb_protocol,
)
from cosettle_adapter.evaluation.mask_clips import (
    VIP_CLASSES,
    davis_clips,
    davis_protocol,
    folder_clips,
    folder_protocol,
    vip_clips,
    vip_protocol,
)
from cosettle_adapter.evaluation.masks import (
    ConfusionMatrix,
    SequenceScores,
    Summary,
    boundary_f,
    evaluate_sequence,
    mean_over_objects,
    region_similarity,
    summarise,
)
from cosettle_adapter.evaluation.point_clips import Tracks, tapvid_clips, tapvid_protocol
from cosettle_adapter.evaluation.points import (
    BadjaAccuracy,
    Pck,
    Queries,
    TapVidMetrics,
    badja_accuracy,
    pck,
    queries_first,
    queries_strided,
    tapvid_metrics,
)
from cosettle_adapter.evaluation.protocols import LABEL_PROTOCOLS, LabelProtocol, Propagation
from cosettle_adapter.evaluation.rendered import rendered_clips, rendered_protocol
from cosettle_adapter.evaluation.run import ClipScores, Evaluation, Protocol, evaluate

__all__ = [
    "BADJA_JOINTS", "JHMDB_JOINTS", "LABEL_PROTOCOLS", "VIP_CLASSES",
    "BadjaAccuracy", "Clip", "ClipScores", "ConfusionMatrix", "Evaluation", "Joints",
    "LabelProtocol", "Pck", "Propagation", "Protocol", "Queries", "SequenceScores",
    "Summary", "TapVidMetrics", "Tracks", "badja_accuracy", "badja_clips", "badja_protocol",
    "boundary_f", "davis_clips", "davis_protocol", "evaluate", "evaluate_sequence", "folder_clips",
    "folder_protocol", "jhmdb_clips", "jhmdb_protocol", "mean_over_objects",
    "pck", "queries_first", "queries_strided", "region_similarity", "rendered_clips",
    "rendered_protocol", "summarise", "tapvid_clips", "tapvid_metrics", "tapvid_protocol",
    "vip_clips", "vip_protocol",
]  # fmt: skip

_CLIPS = ("Badja", "Davis", "Folder", "Jhmdb", "Mask", "TapVid", "Vip", "Joint")
_REMOVED = {  # names of version 0.1 and their replacements
    "davis_sequences": "davis_clips", "j_and_f": "region_similarity and boundary_f",
    "MaskScores": "evaluate_sequence", "mean_over_videos": "the mean of each figure",
}  # fmt: skip


def __getattr__(name: str) -> type[Clip[Any]]:
    if name == "DavisSequence" or (name.endswith("Clip") and name[:-4] in _CLIPS):
        message = f"{name} is now Clip; version 0.3 removes the old name"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return Clip
    instead = f"; version 0.2 has {_REMOVED[name]}" if name in _REMOVED else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")
