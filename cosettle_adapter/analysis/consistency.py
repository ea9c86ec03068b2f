# shim: removed at integration
"""Moved to :mod:`cosettle_adapter.evaluation.consistency`."""

from cosettle_adapter.evaluation.consistency import cycle_accuracy, tracking_error

__all__ = ["cycle_accuracy", "tracking_error"]
