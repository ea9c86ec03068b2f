"""A local page that shows what any patch of a clip is similar to, raw and adapted."""

from __future__ import annotations

from cosettle_adapter.visualization.viewer.clip import ViewedClip, view_clip
from cosettle_adapter.visualization.viewer.server import ViewerServer, open_server

__all__ = ["ViewedClip", "ViewerServer", "open_server", "view_clip"]
