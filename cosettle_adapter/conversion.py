# shim: removed at integration
"""Moved to ``cosettle_adapter.convert``."""

from cosettle_adapter.convert import (
    RELEASED,
    Conversion,
    convert_checkpoint,
    released_projection,
)

__all__ = [
    "RELEASED",
    "Conversion",
    "convert_checkpoint",
    "released_projection",
]
