# shim: removed at integration
"""Data sets under their old place."""

from __future__ import annotations

from cosettle_adapter.evaluation.legacy import davis_sequences as davis_sequences
