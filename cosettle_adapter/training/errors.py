"""Errors of training."""

from __future__ import annotations

from cosettle_adapter.errors import CosettleError


class TrainingError(CosettleError, ValueError):
    """Training that cannot begin, or cannot continue."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient that is not finite; the weights were not changed by it."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, or belongs to another run."""


class DiskFullError(CosettleError, OSError):
    """A file that could not be written for lack of space; what was there before is complete."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what was done is saved, and the message says how to continue."""
