# shim: removed at integration
from cosettle_adapter.video.selection import PendingFrame

__all__ = ["PendingFrame"]
