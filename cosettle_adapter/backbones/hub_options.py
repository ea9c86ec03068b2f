# shim: removed at integration
"""Old place of what is now in ``downloads.py``."""

from cosettle_adapter.backbones.downloads import HubOptions, one_line

__all__ = ["HubOptions", "one_line"]
