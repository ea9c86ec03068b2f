"""How features are computed and stored: the options of an extraction.

Without ``from __future__ import annotations``, so that the command line can derive its options.
"""

import dataclasses
from typing import Literal

import torch

from cosettle_adapter.adapter import DEFAULT_BATCH_SIZE, Size
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.video import Fit

FormatName = Literal["safetensors", "zarr", "npy-memmap", "dino-tracker"]
StorageName = Literal["float32", "bfloat16", "float16"]


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


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
