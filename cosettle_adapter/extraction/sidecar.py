"""The JSON file beside every feature file: what is in it and how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.extraction.formats.base import Layout

VERSION = 1


def sidecar_path(output: Path) -> Path:
    """Return where the sidecar of a feature file lies: ``clip.zarr.json`` beside ``clip.zarr``."""
    return output.with_name(f"{output.name}.json")


def sidecar_text(layout: Layout, timestamps: Sequence[float], *, truncated: str | None) -> str:
    """Return the sidecar of a finished output.

    Args:
        layout: of its features; the metadata is the run's record.
        timestamps: seconds, one a frame.
        truncated: why the source ended early, or ``None``.
    """
    fields = {
        "cosettle_adapter_features": VERSION,
        **layout.metadata,
        "truncated": truncated,
        "shape": [len(timestamps), *layout.shape],
        "geometry": layout.geometry.to_dict(),
        "timestamps": list(timestamps),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_sidecar(output: Path) -> Mapping[str, Any] | None:
    """Return the sidecar of a feature file; ``None`` if there is none that can be read."""
    try:
        fields = json.loads(sidecar_path(output).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(fields, dict) and fields.get("cosettle_adapter_features") == VERSION
    return fields if known else None
