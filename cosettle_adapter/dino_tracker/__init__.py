"""Features for DINO-Tracker (github.com/AssafSinger94/dino-tracker), whose code stays as it is.

It reads features from one file, so that file is the whole interface: a float32 tensor
``(T, 1024, h, w)`` whose cells have their centres at pixel 7 + stride * k of frames of 476 x 854.
"""

from __future__ import annotations

from cosettle_adapter.dino_tracker.cells import CHANNELS, FRAME, STRIDES, cells
from cosettle_adapter.dino_tracker.commands import Command
from cosettle_adapter.dino_tracker.errors import DinoTrackerError
from cosettle_adapter.dino_tracker.features import (
    arrange,
    check_adapter,
    load_overlapping,
    tracker_features,
)
from cosettle_adapter.dino_tracker.preparation import LOCATION, Prepared, prepare
from cosettle_adapter.dino_tracker.scale import Scale
from cosettle_adapter.dino_tracker.tensor_file import (
    HEADER,
    TensorWriter,
    finish_tensor,
    write_tensor,
)

__all__ = [
    "CHANNELS",
    "FRAME",
    "HEADER",
    "LOCATION",
    "STRIDES",
    "Command",
    "DinoTrackerError",
    "Prepared",
    "Scale",
    "TensorWriter",
    "arrange",
    "cells",
    "check_adapter",
    "finish_tensor",
    "load_overlapping",
    "prepare",
    "tracker_features",
    "write_tensor",
]
