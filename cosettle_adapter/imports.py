"""Imports that wait until something is used: optional dependencies and lazy public names."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from cosettle_adapter.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional ``module``, or say which extra installs it.

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


def load_on_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package whose names are imported when first used.

    Args:
        package: its ``__name__``.
        modules: public name to the module that defines it.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load


def moved_to(package: str, *places: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose names have moved: each warns for one version.

    Args:
        package: its ``__name__``.
        *places: modules that have its names now.
    """

    def load(name: str) -> Any:
        for place in () if name.startswith("__") else places:
            found = getattr(importlib.import_module(place), name, None)
            if found is not None:
                warnings.warn(
                    f"{package}.{name} moved to {place}; the old place goes in version 0.3",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
