# shim: removed at integration
"""Moved to data and cached_views."""
