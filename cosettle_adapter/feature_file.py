"""Deprecated: moved to :mod:`cosettle_adapter.extraction`."""

from cosettle_adapter.imports import moved_to

__getattr__ = moved_to(__name__, "cosettle_adapter.extraction")
