# shim: removed at integration
"""Moved to imports."""

from cosettle_adapter.imports import load_on_use

__all__ = ["load_on_use"]
