# shim: removed at integration
"""Data sets under their old place."""

from __future__ import annotations

from cosettle_adapter.evaluation.badja import BADJA_JOINTS, badja_clips  # noqa: F401
from cosettle_adapter.evaluation.clips import Clip  # noqa: F401
from cosettle_adapter.evaluation.davis import davis_clips, newest_year  # noqa: F401
from cosettle_adapter.evaluation.folder import folder_clips  # noqa: F401
from cosettle_adapter.evaluation.jhmdb import JHMDB_JOINTS, jhmdb_clips  # noqa: F401
from cosettle_adapter.evaluation.joints import Joints  # noqa: F401
from cosettle_adapter.evaluation.legacy import davis_sequences  # noqa: F401
from cosettle_adapter.evaluation.tapvid import iter_tapvid_clips, tapvid_clips  # noqa: F401
from cosettle_adapter.evaluation.vip import VIP_CLASSES, vip_clips  # noqa: F401
