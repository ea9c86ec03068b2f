"""What can be asked of an extraction, and the errors that refuse it.

Without ``from __future__ import annotations``, so that the command line can derive its options.
"""

import dataclasses
from typing import Literal

import torch

from cosettle_adapter.adapter import DEFAULT_BATCH_SIZE, Size
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.video import Fit

FormatName = Literal["safetensors", "zarr", "npy-memmap", "dino-tracker"]
StorageName = Literal["float32", "bfloat16", "float16"]


class ExtractionError(CosettleError, RuntimeError):
    """An extraction that cannot be done as it was asked for."""


class FormatError(ExtractionError, ValueError):
    """A format that does not exist, or that cannot hold the features."""


class OutputExistsError(ExtractionError, FileExistsError):
    """The output exists, or was started, with other settings."""


class OutputBusyError(ExtractionError, BlockingIOError):
    """Another run is writing this output."""


class EngineError(ExtractionError):
    """The Ray cluster failed."""


class DinoTrackerError(CosettleError, ValueError):
    """A backbone or features that DINO-Tracker cannot use."""


@dataclasses.dataclass(frozen=True)
class ExtractSettings:
    """How features are computed and stored.

    Attributes:
        format: of the file; by default as its suffix says.
        batch_size: frames per forward pass.
        size: what frames are resized to: the shorter side, or height and width.
        fit: what happens to sides that are not whole patches.
        settle: settle each frame by the statistics of those before it; by default, as the adapter
            does.
        temporal_fusion: average patches with their matches in neighbouring frames: on both sides,
            or in past ones only.
        storage: dtype on disk; by default, the adapter's.
    """

    format: FormatName | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    size: Size | None = None
    fit: Fit = "resize"
    settle: bool | None = None
    temporal_fusion: FusionMode | None = None
    storage: StorageName | torch.dtype | None = None
