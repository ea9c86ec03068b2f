"""Imports that wait until something is used: optional dependencies and lazy public names."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cosettle_adapter.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional ``module``, or say which ``extra`` of this package installs it.

    ``purpose`` is the subject of the sentence: ``"reading video files"``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module.partition('.')[0]!r}, which is not installed "
            f"({error}). Install it with: pip install 'cosettle-adapter[{extra}]'"
        ) from error


def load_on_use(package: str, **names: Sequence[str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package: names to import when first used, by submodule."""
    modules = {name: f"{package}.{module}" for module in names for name in names[module]}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load


def moved_to(package: str, *places: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose names are in ``places`` now: each use warns."""

    def load(name: str) -> Any:
        for place in () if name.startswith("__") else places:
            found = getattr(importlib.import_module(place), name, None)
            if found is not None:
                text = f"{package}.{name} moved to {place}; the old place goes in version 0.3"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                return found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
