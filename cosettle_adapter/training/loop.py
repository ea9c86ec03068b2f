# shim: removed at integration
"""Moved to train."""

from cosettle_adapter.training.train import StepReport, Trained, train

__all__ = ["StepReport", "Trained", "train"]
