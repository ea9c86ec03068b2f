"""Deprecated; the format is in :mod:`cosettle_adapter.extraction.dino_tracker`.

``examples/dino_tracker_features.py`` prepares a folder for DINO-Tracker, as ``prepare`` did.
"""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    from cosettle_adapter.extraction import dino_tracker

    if name.startswith("_") or not hasattr(dino_tracker, name):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; preparing a folder for DINO-Tracker "
            "is examples/dino_tracker_features.py since version 0.2"
        )
    warnings.warn(
        f"import {name} from cosettle_adapter.extraction.dino_tracker; "
        "cosettle_adapter.dino_tracker goes in version 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(dino_tracker, name)
