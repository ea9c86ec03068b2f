# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.synthetic import photographs

__all__ = ["photographs"]
