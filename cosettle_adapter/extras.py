"""Optional dependencies, imported when first used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from cosettle_adapter.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional ``module`` or say which extra brings it.

    Args:
        module: dotted module name, for example ``"av"`` or ``"PIL.Image"``.
        extra: the extra of this package that installs it, for example ``"video"``.
        purpose: what it is needed for, as the subject of a sentence: ``"reading video files"``.

    Raises:
        MissingExtraError: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module.partition('.')[0]!r}, which is not installed "
            f"({error}). Install it with: pip install 'cosettle-adapter[{extra}]'"
        ) from error
