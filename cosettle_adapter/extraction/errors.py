"""What can be wrong with an extraction."""

from __future__ import annotations

from cosettle_adapter.errors import CosettleError


class ExtractionError(CosettleError, RuntimeError):
    """An extraction that cannot go on as it was asked for."""


class FormatError(ExtractionError, ValueError):
    """A format that does not exist, or that cannot hold what it should."""


class OutputExistsError(ExtractionError, FileExistsError):
    """There is something under the output's name, or a started run, that is not this one's."""


class OutputBusyError(ExtractionError, BlockingIOError):
    """Another run is writing this output."""


class EngineError(ExtractionError):
    """The engine that spreads an extraction over machines broke down."""
