"""What is asked of an extraction, apart from the model and the source."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from cosettle_adapter.adapter import DEFAULT_BATCH_SIZE, Size
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.video.geometry import Fit


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of :func:`extract` that decide what is in the file.

    Attributes:
        size: what frames are resized to.
        fit: what happens to sides that are not whole patches.
        start: first second to read.
        end: second to stop before.
        every: keep every n-th frame.
        max_frames: keep at most this many frames.
        fps: frames per second of sources without timestamps.
        settle: settle each frame by the statistics of those before it; ``None`` for the
            adapter's own way.
        temporal_fusion: average patches with their matches in neighbouring frames.
        storage: dtype of the stored features; ``None`` for the adapter's.
        batch_size: frames a forward pass.
    """

    size: Size | None = None
    fit: Fit = "resize"
    start: float | None = None
    end: float | None = None
    every: int = 1
    max_frames: int | None = None
    fps: float | None = None
    settle: bool | None = None
    temporal_fusion: FusionMode | None = None
    storage: torch.dtype | None = None
    batch_size: int = DEFAULT_BATCH_SIZE

    def stream_options(self) -> dict[str, Any]:
        """Return the keywords of :meth:`CoSettleAdapter.stream`."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["storage"]
        return options
