# shim: removed at integration
from cosettle_adapter.video.decoder import FileRange

__all__ = ["FileRange"]
