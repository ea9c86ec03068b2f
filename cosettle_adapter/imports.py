"""Deferred imports: optional dependencies and lazily loaded public names."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cosettle_adapter.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional ``module``; the error names its ``purpose`` and ``extra``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module.partition('.')[0]!r}, which is not installed "
            f"({error}). Install it with: pip install 'cosettle-adapter[{extra}]'"
        ) from error


def load_on_use(package: str, **names: Sequence[str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` that imports ``names``, by submodule, on first use."""
    modules = {name: f"{package}.{module}" for module in names for name in names[module]}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load


def moved_to(package: str, *modules: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose names moved to ``modules``; each use warns."""

    def load(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            value = getattr(importlib.import_module(module), name, None)
            if value is not None:
                text = f"{package}.{name} moved to {module}; version 0.3 removes the old name"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
