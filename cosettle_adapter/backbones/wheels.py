# shim: removed at integration
"""Old place of what is now in ``downloads.py``."""

from cosettle_adapter.backbones.downloads import fetch_wheel_member, file_sha256

__all__ = ["fetch_wheel_member", "file_sha256"]
