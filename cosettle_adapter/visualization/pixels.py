"""Frames to draw over, and maps of cells as they lie on their pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video.geometry import Geometry, resample_to_points

FRAMES_AT_ONCE = 8  # finding each pixel's cells costs more than reading them for a few frames


def check_frames(frames: Tensor) -> tuple[int, int, int]:
    """Return (T, H, W) of ``(T, 3, H, W)`` uint8 frames.

    Raises:
        FrameError: anything else.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise FrameError(
            f"got frames of shape {tuple(frames.shape)} and dtype {frames.dtype}, expected "
            "(T, 3, H, W) uint8 in [0, 255]."
        )
    return frames.shape[0], frames.shape[2], frames.shape[3]


def check_geometry(frames: Tensor, geometry: Geometry) -> None:
    """Raise unless the geometry was planned for frames of this size.

    Raises:
        GeometryError: it was planned for another size.
    """
    if tuple(frames.shape[-2:]) != geometry.frame:
        raise GeometryError(
            f"got frames of {tuple(frames.shape[-2:])} pixels, but the geometry was planned for "
            f"{geometry.frame}; draw on the frames that were encoded, or plan the geometry for "
            "the frames to draw on."
        )


def pixel_centres(height: int, width: int) -> Tensor:
    """Return ``(H, W, 2)`` float32 (x, y) of every pixel's centre."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def at_pixels(maps: Tensor, geometry: Geometry) -> Tensor:
    """Read maps ``(T, C, h, w)`` at every pixel of the original frame: ``(T, C, H, W)``."""
    return resample_to_points(maps, geometry, pixel_centres(*geometry.frame))
