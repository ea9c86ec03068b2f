# shim: removed at integration
"""Old place of what is now in ``downloads.py`` and ``weights.py``."""

from cosettle_adapter.backbones.downloads import (
    OFFICIAL_REPOSITORY,
    ReleasedFile,
    choose_checkpoint,
    converted_folder,
    released_checkpoint,
)
from cosettle_adapter.backbones.weights import BACKBONE_FILE

__all__ = [
    "BACKBONE_FILE",
    "OFFICIAL_REPOSITORY",
    "ReleasedFile",
    "choose_checkpoint",
    "converted_folder",
    "released_checkpoint",
]
