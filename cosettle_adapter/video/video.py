# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.decoder import decode_video

__all__ = ["decode_video"]
