# shim: removed at integration
from cosettle_adapter.video.geometry import apply_geometry, resample_to_points, resize

__all__ = ["apply_geometry", "resample_to_points", "resize"]
