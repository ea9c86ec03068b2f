"""Temporally consistent patch features: frozen image encoders plus one small projection.

The public names load on first use, so that ``import cosettle_adapter`` costs milliseconds and
touches neither torch nor any optional dependency.
"""

from typing import TYPE_CHECKING

from cosettle_adapter.imports import load_on_use
from cosettle_adapter.version import __version__

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter, FeatureChunk
    from cosettle_adapter.backbones import load_backbone
    from cosettle_adapter.features import Tokens
    from cosettle_adapter.hub import list_models
    from cosettle_adapter.projection import Projection, ProjectionConfig
    from cosettle_adapter.training.fit import fit
    from cosettle_adapter.video.geometry import Geometry
    from cosettle_adapter.video.selection import FrameSelection

__all__ = [
    "CoSettleAdapter", "FeatureChunk", "FrameSelection", "Geometry", "Projection",
    "ProjectionConfig", "Tokens", "__version__", "fit", "list_models", "load_backbone",
]  # fmt: skip

__getattr__ = load_on_use(
    __name__,
    **{
        "adapter": ["CoSettleAdapter", "FeatureChunk"],
        "backbones": ["load_backbone"],
        "features": ["Tokens"],
        "hub": ["list_models"],
        "projection": ["Projection", "ProjectionConfig"],
        "training.fit": ["fit"],
        "video.geometry": ["Geometry"],
        "video.selection": ["FrameSelection"],
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
