# shim: removed at integration
"""Moved to corpus."""

from cosettle_adapter.training.corpus import Corpus

__all__ = ["Corpus"]
