# shim: removed at integration
from cosettle_adapter.video.decoder import decode_video

__all__ = ["decode_video"]
