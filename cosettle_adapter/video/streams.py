# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.decoder import FileRange

__all__ = ["FileRange"]
