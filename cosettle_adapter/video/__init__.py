"""Read any source as chunks of uint8 frames with timestamps, and map pixels to patches."""

from typing import TYPE_CHECKING

from cosettle_adapter.imports import load_on_use
from cosettle_adapter.video.arrays import as_frames, validate_frames
from cosettle_adapter.video.decoder import SourceInfo
from cosettle_adapter.video.files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    find_images,
    find_videos,
    is_image,
    is_video,
    read_image,
)
from cosettle_adapter.video.geometry import (
    Fit,
    Geometry,
    apply_geometry,
    plan_geometry,
    resample_to_points,
)
from cosettle_adapter.video.prefetch import prefetch
from cosettle_adapter.video.reader import FrameChunk, open_frames, pinned, probe
from cosettle_adapter.video.selection import FrameSelection

if TYPE_CHECKING:
    from cosettle_adapter.video.random_access import count_frames, read_frames
    from cosettle_adapter.video.synthetic import RenderedClip, photographs, render_clip

__all__ = [
    "IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "Fit", "FrameChunk", "FrameSelection", "Geometry",
    "RenderedClip", "SourceInfo", "apply_geometry", "as_frames", "count_frames", "find_images",
    "find_videos", "is_image", "is_video", "open_frames", "photographs", "pinned",
    "plan_geometry", "prefetch", "probe", "read_frames", "read_image", "render_clip",
    "resample_to_points", "validate_frames",
]  # fmt: skip

__getattr__ = load_on_use(
    __name__,
    random_access=["count_frames", "read_frames"],
    synthetic=["RenderedClip", "photographs", "render_clip"],
)
