"""The errors that the package raises on purpose.

All derive from :class:`CosettleError`, and each also from the built-in exception that a caller
would catch first, so that ``except ValueError`` works in code that does not know this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CosettleError(Exception):
    """Root of the package's errors."""


class MissingExtraError(CosettleError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class UnknownModelError(CosettleError, ValueError):
    """A name that is neither a registered model, a Hub repository nor a local folder."""


class ProjectionFormatError(CosettleError, ValueError):
    """A projection folder whose config or weights do not follow the format."""


class BackboneMismatchError(CosettleError, ValueError):
    """A projection combined with a backbone other than the one it was fitted on."""


class WeightsUnavailableError(CosettleError, OSError):
    """No source could deliver a file; the message lists what was tried, in order."""


class CorruptWeightsError(CosettleError, ValueError):
    """A weight file that is truncated, altered, or not of the model it should be."""


class CorruptFeatureFileError(CosettleError, ValueError):
    """A feature file that is truncated, damaged, or not a feature file at all."""


class StatisticsError(CosettleError, ValueError):
    """Features or clips from which nothing can be computed: too few, all equal, not finite."""


class FrameError(CosettleError, ValueError):
    """Frames or a frame source that cannot be used: shape, range, nothing to read."""


class TruncatedVideoError(FrameError):
    """A video that ends early or breaks in the middle."""

    def __init__(self, message: str, *, frames_read: int) -> None:
        super().__init__(message)
        self.frames_read = frames_read  # delivered before the break


class GeometryError(CosettleError, ValueError):
    """A frame, grid or stride that does not fit the backbone."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or an empty string when nothing is close."""
    spelled = {candidate.lower(): candidate for candidate in sorted(known)}
    close = difflib.get_close_matches(name.lower(), list(spelled), n=limit, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(spelled[match]) for match in close)}?"
