# shim: removed at integration
# ruff: noqa: D100
from cosettle_adapter.video.synthetic import Motion, RenderedClip, render_clip

__all__ = ["Motion", "RenderedClip", "render_clip"]
