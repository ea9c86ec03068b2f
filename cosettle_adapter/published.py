# shim: removed at integration
"""Moved to ``cosettle_adapter.hub``."""

from cosettle_adapter.hub import (
    ModelInfo,
    PublishedProjection,
    bundled_folder,
    find_projection,
    is_published,
    list_models,
)

__all__ = [
    "ModelInfo",
    "PublishedProjection",
    "bundled_folder",
    "find_projection",
    "is_published",
    "list_models",
]
