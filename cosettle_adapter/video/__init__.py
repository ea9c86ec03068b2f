"""Anything to uint8 frames and timestamps, one chunk at a time, and from pixels to cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosettle_adapter.lazy import load_on_use
from cosettle_adapter.video.arrays import as_frames, validate_frames
from cosettle_adapter.video.files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    find_images,
    find_videos,
    is_image,
    is_video,
)
from cosettle_adapter.video.geometry import Fit, Geometry, plan_geometry
from cosettle_adapter.video.photographs import photographs
from cosettle_adapter.video.prefetch import prefetch
from cosettle_adapter.video.resampling import apply_geometry, resample_to_points
from cosettle_adapter.video.selection import FrameSelection
from cosettle_adapter.video.sources import FrameChunk, SourceInfo, open_frames, pinned, probe

if TYPE_CHECKING:
    from cosettle_adapter.video.rendered import RenderedClip, render_clip

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Fit",
    "FrameChunk",
    "FrameSelection",
    "Geometry",
    "RenderedClip",
    "SourceInfo",
    "apply_geometry",
    "as_frames",
    "find_images",
    "find_videos",
    "is_image",
    "is_video",
    "open_frames",
    "photographs",
    "pinned",
    "plan_geometry",
    "prefetch",
    "probe",
    "render_clip",
    "resample_to_points",
    "validate_frames",
]

# not what every user of frames needs
__getattr__ = load_on_use(
    __name__,
    {
        "RenderedClip": "cosettle_adapter.video.rendered",
        "render_clip": "cosettle_adapter.video.rendered",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
