# shim: removed at integration
"""Moved to affinity."""

from cosettle_adapter.correspondence.affinity import each_map, unit_map

__all__ = ["each_map", "unit_map"]
