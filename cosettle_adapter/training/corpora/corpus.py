# shim: removed at integration
"""Moved to corpus."""

from cosettle_adapter.training.corpus import Corpus, Video

__all__ = ["Corpus", "Video"]
