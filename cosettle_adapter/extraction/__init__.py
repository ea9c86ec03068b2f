"""Extract the features of one or many sources, of any length, to files; resumable."""

from __future__ import annotations

from cosettle_adapter.extraction.formats import FORMATS, FeatureFile, read_features
from cosettle_adapter.extraction.many import (
    Job,
    Outcome,
    RayOptions,
    Shard,
    Source,
    extract_many,
    extract_with_ray,
    find_sources,
    plan_jobs,
)
from cosettle_adapter.extraction.run import Extraction, extract
from cosettle_adapter.extraction.settings import ExtractSettings

__all__ = [
    "FORMATS", "ExtractSettings", "Extraction", "FeatureFile", "Job", "Outcome", "RayOptions",
    "Shard", "Source", "extract", "extract_many", "extract_with_ray", "find_sources", "plan_jobs",
    "read_features",
]  # fmt: skip
