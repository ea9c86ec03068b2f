# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.geometry import nearest_valid

__all__ = ["nearest_valid"]
