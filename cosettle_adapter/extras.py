# shim: removed at integration
"""Moved to imports."""

from cosettle_adapter.imports import require

__all__ = ["require"]
