"""Data sets for evaluation, each a list of clips that are read when asked.

All clips have a ``name``, a length, ``read_frame(i)`` and a ``problem``; see
:class:`~cosettle_adapter.evaluation.datasets.clips.Clip`. One bad clip never keeps the others from
being listed.
"""

from __future__ import annotations

from cosettle_adapter.evaluation.datasets.badja import BADJA_JOINTS, BadjaClip, badja_clips
from cosettle_adapter.evaluation.datasets.clips import (
    Clip,
    ImageClip,
    JointClip,
    Joints,
    MaskClip,
)
from cosettle_adapter.evaluation.datasets.davis import (
    DavisSequence,
    davis_sequences,
    newest_year,
)
from cosettle_adapter.evaluation.datasets.folder import FolderClip, folder_clips
from cosettle_adapter.evaluation.datasets.jhmdb import JHMDB_JOINTS, JhmdbClip, jhmdb_clips
from cosettle_adapter.evaluation.datasets.rendered import RenderedPhoto, rendered_photos
from cosettle_adapter.evaluation.datasets.tapvid import (
    TapVidClip,
    iter_tapvid_clips,
    tapvid_clips,
)
from cosettle_adapter.evaluation.datasets.vip import VIP_CLASSES, VipClip, vip_clips

__all__ = [
    "BADJA_JOINTS",
    "JHMDB_JOINTS",
    "VIP_CLASSES",
    "BadjaClip",
    "Clip",
    "DavisSequence",
    "FolderClip",
    "ImageClip",
    "JhmdbClip",
    "JointClip",
    "Joints",
    "MaskClip",
    "RenderedPhoto",
    "TapVidClip",
    "VipClip",
    "badja_clips",
    "davis_sequences",
    "folder_clips",
    "iter_tapvid_clips",
    "jhmdb_clips",
    "newest_year",
    "rendered_photos",
    "tapvid_clips",
    "vip_clips",
]
