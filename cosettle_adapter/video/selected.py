# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.random_access import count_frames, read_frames

__all__ = ["count_frames", "read_frames"]
