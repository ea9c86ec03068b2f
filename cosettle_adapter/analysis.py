"""Deprecated: moved to :mod:`cosettle_adapter.evaluation`."""

from cosettle_adapter.imports import moved_to

_MODULES = ("variants", "drift", "representation", "spectra")

__getattr__ = moved_to(__name__, *(f"cosettle_adapter.evaluation.{name}" for name in _MODULES))
