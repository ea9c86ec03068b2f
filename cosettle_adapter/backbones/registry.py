"""The backbones we know by name. Adding one is adding a row in ``rows/``.

A row is everything that tells one encoder from another; code never asks for a name. Names outside
the table reach every other encoder: ``timm:<tag>`` and ``open_clip:<arch>/<tag>``.
"""

from __future__ import annotations

import importlib

from cosettle_adapter.backbones.row import BackboneRow, HubFile, Release, WheelFile
from cosettle_adapter.backbones.rows import features, paper, transformers, video
from cosettle_adapter.errors import UnknownModelError, did_you_mean

__all__ = [
    "REGISTRY",
    "BackboneRow",
    "HubFile",
    "Release",
    "WheelFile",
    "is_backbone_name",
    "lookup",
]

REGISTRY: dict[str, BackboneRow] = {
    row.name: row for row in (*paper.ROWS, *transformers.ROWS, *video.ROWS, *features.ROWS)
}

_OTHER_SOURCES = {  # prefix of a name: module whose resolve() makes a row of the rest
    "timm:": "cosettle_adapter.backbones.timm_tags",
    "open_clip:": "cosettle_adapter.backbones.open_clip",
}


def lookup(name: str) -> BackboneRow:
    """Return the row called ``name``: a registered one, ``timm:<tag>`` or ``open_clip:...``.

    Raises:
        UnknownModelError: there is none; close names are suggested.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    for prefix, module in _OTHER_SOURCES.items():
        if name.startswith(prefix):
            row: BackboneRow = importlib.import_module(module).resolve(name.removeprefix(prefix))
            return row
    raise UnknownModelError(
        f"unknown backbone {name!r}.{did_you_mean(name, REGISTRY)} "
        f"`cosettle-adapter list --backbones` shows all {len(REGISTRY)}; any other is reached as "
        "timm:<tag> or open_clip:<arch>/<tag>."
    )


def is_backbone_name(name: str) -> bool:
    """Whether ``name`` is a registered backbone or names one by another source's prefix."""
    return name in REGISTRY or name.startswith(tuple(_OTHER_SOURCES))
