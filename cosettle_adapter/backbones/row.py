# shim: removed at integration
"""Old place of what is now in ``rows.py``."""

from cosettle_adapter.backbones.rows import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    BackboneRow,
    HubFile,
    PositionInterpolation,
    PositionKind,
    Release,
    WheelFile,
)

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "OPENAI_MEAN",
    "OPENAI_STD",
    "BackboneRow",
    "HubFile",
    "PositionInterpolation",
    "PositionKind",
    "Release",
    "WheelFile",
]
