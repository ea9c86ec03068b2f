"""The exceptions that the package raises.

All derive from :class:`CosettleError` and from the closest built-in exception, so that ``except
ValueError`` also works in code that does not know this package.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class CosettleError(Exception):
    """Base class of the package's errors."""


class MissingExtraError(CosettleError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class UnknownModelError(CosettleError, ValueError):
    """A name that is neither a registered model, a Hub repository nor a local folder."""


class ProjectionFormatError(CosettleError, ValueError):
    """A projection whose config or weights do not follow the format."""


class BackboneMismatchError(CosettleError, ValueError):
    """A projection combined with a backbone other than the one it was fitted on."""


class WeightsUnavailableError(CosettleError, OSError):
    """No source provided a file; the message lists the sources tried, in order."""


class CorruptWeightsError(CosettleError, ValueError):
    """A weight file that is truncated, altered, or of another model."""


class CorruptFeatureFileError(CosettleError, ValueError):
    """A feature file that is truncated, damaged, or not a feature file at all."""


class StatisticsError(CosettleError, ValueError):
    """Features or clips without usable statistics: too few, all equal, or not finite."""


class FrameError(CosettleError, ValueError):
    """Frames of an unsupported shape or range, or a source without frames."""


class DamagedError(FrameError):
    """A source that lost frames to damage, read with ``on_damage="error"``."""


class GeometryError(CosettleError, ValueError):
    """A frame, grid or stride that does not fit the backbone."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or an empty string if no name is similar."""
    originals = {candidate.lower(): candidate for candidate in sorted(known)}
    matches = difflib.get_close_matches(name.lower(), list(originals), n=limit)
    if not matches:
        return ""
    return f" Did you mean {' or '.join(repr(originals[match]) for match in matches)}?"


def __getattr__(name: str) -> type[DamagedError]:
    if name == "TruncatedVideoError":
        text = "TruncatedVideoError is DamagedError; version 0.3 removes the old name"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return DamagedError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
