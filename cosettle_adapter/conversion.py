# shim: removed at integration
"""Moved to ``cosettle_adapter.convert``."""

from cosettle_adapter.convert import (  # noqa: F401
    RELEASED,
    Conversion,
    convert_checkpoint,
    public_weights,
    released_projection,
)
