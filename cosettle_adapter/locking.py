# shim: removed at integration
"""Moved to io."""

from cosettle_adapter.io import LOCK_FILE, exclusive

__all__ = ["LOCK_FILE", "exclusive"]
