# shim: removed at integration
from cosettle_adapter.video.synthetic import photographs

__all__ = ["photographs"]
