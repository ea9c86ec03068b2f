# shim: removed at integration
"""Moved to model_selection."""

from cosettle_adapter.training.model_selection import labels

__all__ = ["labels"]
