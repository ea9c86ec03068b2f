"""Frames through an adapter into feature files: any length, any number, resumable."""

from __future__ import annotations

from cosettle_adapter.extraction.formats import FORMATS, FeatureFile, read_features
from cosettle_adapter.extraction.run import (
    Extraction,
    Job,
    Outcome,
    extract,
    extract_many,
    plan_jobs,
)
from cosettle_adapter.extraction.settings import ExtractSettings
from cosettle_adapter.extraction.sources import Shard, Source, find_sources

__all__ = [
    "FORMATS",
    "ExtractSettings",
    "Extraction",
    "FeatureFile",
    "Job",
    "Outcome",
    "Shard",
    "Source",
    "extract",
    "extract_many",
    "find_sources",
    "plan_jobs",
    "read_features",
]
