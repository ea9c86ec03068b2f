"""What can go wrong when a model is exported."""

from __future__ import annotations

from cosettle_adapter.errors import CosettleError


class ExportError(CosettleError, ValueError):
    """A model that cannot be exported, or whose file computes something else than the model."""
