"""Temporally consistent patch features: frozen image encoders plus one small projection.

The public names load on first use, so that ``import cosettle_adapter`` costs milliseconds and
touches neither torch nor any optional dependency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosettle_adapter.imports import load_on_use
from cosettle_adapter.version import __version__

_PUBLIC = {
    "CoSettleAdapter": "cosettle_adapter.adapter",
    "FeatureChunk": "cosettle_adapter.streaming",
    "FrameSelection": "cosettle_adapter.video.selection",
    "Geometry": "cosettle_adapter.video.geometry",
    "Projection": "cosettle_adapter.projection",
    "ProjectionConfig": "cosettle_adapter.projection",
    "fit": "cosettle_adapter.training.fit",
    "list_models": "cosettle_adapter.hub",
    "load_backbone": "cosettle_adapter.backbones",
}

__all__ = [
    "CoSettleAdapter",
    "FeatureChunk",
    "FrameSelection",
    "Geometry",
    "Projection",
    "ProjectionConfig",
    "__version__",
    "fit",
    "list_models",
    "load_backbone",
]

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.backbones import load_backbone
    from cosettle_adapter.hub import list_models
    from cosettle_adapter.projection import Projection, ProjectionConfig
    from cosettle_adapter.streaming import FeatureChunk
    from cosettle_adapter.training.fit import fit
    from cosettle_adapter.video.geometry import Geometry
    from cosettle_adapter.video.selection import FrameSelection


__getattr__ = load_on_use(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted(__all__)
