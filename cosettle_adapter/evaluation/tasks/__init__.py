"""Benchmarks on clips, each a class; what they have in common is in ``base``."""

from __future__ import annotations

from cosettle_adapter.evaluation.tasks.base import ClipScores, Task
from cosettle_adapter.evaluation.tasks.joints import Badja, Jhmdb
from cosettle_adapter.evaluation.tasks.masks import Davis, Folder
from cosettle_adapter.evaluation.tasks.parts import Vip
from cosettle_adapter.evaluation.tasks.points import TapVid
from cosettle_adapter.evaluation.tasks.rendered import Rendered

__all__ = [
    "Badja",
    "ClipScores",
    "Davis",
    "Folder",
    "Jhmdb",
    "Rendered",
    "TapVid",
    "Task",
    "Vip",
]
