# shim: removed at integration
"""Moved to io."""

from cosettle_adapter.io import atomic_path

__all__ = ["atomic_path"]
