"""Results as JSON that every reader takes: a figure that is not a number is ``null``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosettle_adapter.files import atomic_path


def plain(value: Any) -> Any:
    """Return a value as dictionaries, lists, strings, numbers and None.

    Data classes become dictionaries, keys strings, NaN and infinities None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def numbers(value: Any) -> Any:
    """Undo :func:`plain` for figures: None becomes NaN again."""
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return value


def write_json(value: Any, path: Path) -> None:
    """Write a value as a JSON file, whole or not at all."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
