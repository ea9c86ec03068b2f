"""Frames through an adapter into feature files: any length, any number, resumable."""

from __future__ import annotations

from cosettle_adapter.extraction.finished import Extraction
from cosettle_adapter.extraction.many import Job, Outcome, extract_many, plan_jobs
from cosettle_adapter.extraction.run import extract
from cosettle_adapter.extraction.sharding import Shard
from cosettle_adapter.extraction.sources import Source, find_sources

__all__ = [
    "Extraction",
    "Job",
    "Outcome",
    "Shard",
    "Source",
    "extract",
    "extract_many",
    "find_sources",
    "plan_jobs",
]
