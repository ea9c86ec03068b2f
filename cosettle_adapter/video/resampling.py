# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.geometry import apply_geometry, resample_to_points, resize

__all__ = ["apply_geometry", "resample_to_points", "resize"]
