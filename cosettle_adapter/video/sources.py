# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.decoder import SourceInfo
from cosettle_adapter.video.reader import open_frames, pending_frames, probe

__all__ = ["SourceInfo", "open_frames", "pending_frames", "probe"]
