# shim: removed at integration
"""Old place of what is now in ``feature_maps.py``."""

from cosettle_adapter.backbones.feature_maps import FeatureMapBackbone

__all__ = ["FeatureMapBackbone"]
