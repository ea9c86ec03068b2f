"""What can go wrong with a benchmark."""

from __future__ import annotations

from cosettle_adapter.errors import CosettleError


class BenchmarkError(CosettleError, ValueError):
    """Two sides that do not compute the same, or a benchmark that cannot be run here."""
