# shim: removed at integration
"""Moved to encoding."""

from cosettle_adapter.training.encoding import compile_encoder

__all__ = ["compile_encoder"]
