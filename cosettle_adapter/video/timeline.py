# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.selection import PendingFrame

__all__ = ["PendingFrame"]
