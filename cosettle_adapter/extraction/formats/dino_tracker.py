"""The one file that DINO-Tracker reads, from any source and by the way of any extraction.

Frames are resized as everywhere in this package, not by Lanczos as DINO-Tracker does it, and
features are left as long as they are; :func:`cosettle_adapter.dino_tracker.prepare` does more.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter import dino_tracker as tracker
from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.extraction.errors import FormatError
from cosettle_adapter.extraction.formats.base import Format, Layout
from cosettle_adapter.extraction.formats.flat import FlatStore
from cosettle_adapter.extraction.settings import Settings
from cosettle_adapter.video.geometry import Geometry, plan_geometry


class TrackerStore(FlatStore):
    """A tensor file under construction."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Open the file, or make it."""
        super().__init__(path, layout, reserved=tracker.HEADER)

    def finish(self, timestamps: Tensor) -> None:
        """Make it a file for ``torch.load``; the timestamps are in the sidecar alone."""
        del timestamps
        shape = (self._frames, *self.layout.shape)
        tracker.finish_tensor(self._file, shape, location=tracker.LOCATION)
        self._file.flush()


def plan(adapter: CoSettleAdapter, settings: Settings) -> Settings:
    """Let the encoder see frames of 476 x 854, or of the nearest sides that are whole patches.

    Raises:
        DinoTrackerError: the adapter has more channels than DINO-Tracker's network.
        FormatError: a frame size or a fit was asked for.
    """
    tracker.check_adapter(adapter)
    if settings.size is not None or settings.fit != "resize":
        raise FormatError("DINO-Tracker's frames are 476 x 854: leave --size and --fit out")
    patch, stride = adapter.backbone.patch, adapter.backbone.stride
    size = plan_geometry(*tracker.FRAME, patch=patch, stride=stride).padded
    return dataclasses.replace(settings, size=size, storage=settings.storage or torch.float32)


def arrange(features: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Put features onto its grid: of stride 7 where the adapter's is 7, otherwise of stride 14."""
    stride = 7 if geometry.stride == 7 else 14
    arranged = tracker.arrange(features, geometry, stride=stride)
    return arranged, tracker.cells(stride, frame=geometry.frame)


def read(path: Path, start: int | None, stop: int | None) -> Tensor:
    """Return features, mapped from disk."""
    features: Tensor = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return features[start:stop]


FORMAT = Format(
    name="dino-tracker",
    suffix=".pt",
    summary="DINO-Tracker's dino_embed_video.pt, at --stride 7 or (otherwise) 14",
    dtypes=(torch.float32,),
    open=TrackerStore,
    read=read,
    plan=plan,
    arrange=arrange,
)
