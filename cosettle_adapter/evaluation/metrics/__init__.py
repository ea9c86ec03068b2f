# shim: removed at integration
"""Measures under their old place."""

from __future__ import annotations

from cosettle_adapter.evaluation.masks import boundary_f as boundary_f
from cosettle_adapter.evaluation.masks import region_similarity as region_similarity
