"""Deprecated; ``read_features`` is in :mod:`cosettle_adapter.extraction`."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("FeatureFile", "read_features"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cosettle_adapter import extraction

    warnings.warn(
        f"import {name} from cosettle_adapter.extraction; cosettle_adapter.feature_file goes in "
        "version 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(extraction, name)
