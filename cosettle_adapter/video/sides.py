# shim: removed at integration
from cosettle_adapter.video.geometry import nearest_valid

__all__ = ["nearest_valid"]
