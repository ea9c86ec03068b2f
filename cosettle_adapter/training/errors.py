"""Errors of gradient training."""

from __future__ import annotations

from cosettle_adapter.errors import CosettleError


class TrainingError(CosettleError, ValueError):
    """Training that cannot begin, or cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient that is not a number; the weights were not touched by it."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, or belongs to another run."""


class DiskFullError(CosettleError, OSError):
    """A file that could not be written for want of space; what was there before is whole."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what was done is saved, and the message says how to go on."""
