# shim: removed at integration
"""Moved to ``cosettle_adapter.hub``."""

from cosettle_adapter.hub import (  # noqa: F401
    ModelInfo,
    PublishedProjection,
    bundled_folder,
    find_projection,
    is_published,
    list_models,
)
