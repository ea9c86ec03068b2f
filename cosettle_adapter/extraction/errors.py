"""What can be wrong with an extraction."""

from __future__ import annotations

from cosettle_adapter.errors import CorruptFeatureFileError, CorruptWeightsError, CosettleError


class ExtractionError(CosettleError, RuntimeError):
    """An extraction that cannot be done as it was asked for."""


class FormatError(ExtractionError, ValueError):
    """A format that does not exist, or that cannot hold the features."""


class OutputExistsError(ExtractionError, FileExistsError):
    """The output exists, or was started, with other settings."""


class OutputBusyError(ExtractionError, BlockingIOError):
    """Another run is writing this output."""


class EngineError(ExtractionError):
    """The Ray cluster failed."""


class DinoTrackerError(CosettleError, ValueError):
    """A backbone or features that DINO-Tracker cannot use."""


class DamagedFeatureFileError(CorruptFeatureFileError, CorruptWeightsError):
    """What is raised until version 0.3, for code that expects the error of version 0.1."""
