"""Any number of videos, as files, frame folders or shards, read a few frames at a time."""

from __future__ import annotations

from cosettle_adapter.training.corpora.corpus import Corpus

__all__ = ["Corpus"]
