# shim: removed at integration (or kept for version 0.2, as it warns)
"""Folded into :mod:`cosettle_adapter.evaluation`; its names warn and go in version 0.3."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    compare_features: Callable[..., dict[str, Tensor]]
    drift_by_gap: Callable[..., dict[str, float]]

# names of version 0.1 that changed
_RENAMED = {
    "FeatureKind": "FeatureVariant",
    "comes_home": "cycle_consistent",
    "feature_kinds": "feature_variants",
    "guide_kind": "guide_variant",
    "read_blocks": "read_layers",
}
_MODULES = ("variants", "drift", "consistency", "representation_metrics", "spectra")


def __getattr__(name: str) -> Any:
    new = _RENAMED.get(name, name)
    for module in _MODULES:
        place = f"cosettle_adapter.evaluation.{module}"
        found = getattr(importlib.import_module(place), new, None)
        if found is not None and not name.startswith("_"):
            message = f"cosettle_adapter.analysis.{name} goes in version 0.3; use {place}.{new}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return _OLD_KEYWORDS[name](found) if name in _OLD_KEYWORDS else found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _renamed_keyword(old: str, new: str) -> Any:
    def wrap(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if old in options:
                options[new] = options.pop(old)
            return function(*args, **options)

        return call

    return wrap


_OLD_KEYWORDS = {
    "feature_kinds": _renamed_keyword("beside", "baselines"),
    "compare_features": _renamed_keyword("kinds", "variants"),
}
