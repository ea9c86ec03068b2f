"""Colours, frame checks and resampling shared by all pictures."""

from __future__ import annotations

import torch
from einops import rearrange
from PIL import Image  # comes with torchvision, which timm requires
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.imports import require
from cosettle_adapter.video.geometry import Geometry, resample_to_points

# Okabe and Ito, "Color Universal Design", without black: orange, sky blue, bluish green, yellow,
# reddish purple, vermillion, blue
_DISTINCT = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0),
    (0, 114, 178),
)  # fmt: skip
_DARKEST = 0.35  # share of the scale that is too dark for lines


def distinct_colours(count: int) -> Tensor:
    """Return ``(count, 3)`` uint8 RGB colours that are easy to tell apart.

    Up to seven are from the palette of Okabe and Ito, which is safe for colour-blind readers; more
    are spread over :func:`colour_scale` in order, so that neighbours have similar colours.
    """
    if count <= len(_DISTINCT):
        return torch.tensor(_DISTINCT, dtype=torch.uint8)[:count]
    return colour_scale(torch.linspace(_DARKEST, 1, count))


def colour_scale(values: Tensor) -> Tensor:
    """Map values in [0, 1] to matplotlib's perceptually uniform colour map "inferno".

    Returns ``(..., 3)`` uint8 RGB on the CPU; values outside are clamped.
    """
    matplotlib = require("matplotlib", extra="viz", purpose="a colour scale")
    rgba = matplotlib.colormaps["inferno"](values.float().clamp(0, 1).cpu().numpy(), bytes=True)
    return torch.from_numpy(rgba)[..., :3]


def check_frames(frames: Tensor, geometry: Geometry | None = None, *, name: str = "frames") -> None:
    """Raise unless frames are ``(T, 3, H, W)`` uint8, of the size planned in a geometry."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise FrameError(
            f"got {name} of shape {tuple(frames.shape)} and dtype {frames.dtype}, expected "
            "(T, 3, H, W) uint8 in [0, 255]"
        )
    if geometry is not None and tuple(frames.shape[-2:]) != geometry.frame:
        raise GeometryError(
            f"got {name} of {tuple(frames.shape[-2:])} pixels, but the geometry was planned for "
            f"{geometry.frame}; draw on the encoded frames, or plan the geometry for these frames"
        )


def at_pixels(maps: Tensor, geometry: Geometry) -> Tensor:
    """Resample maps ``(T, C, h, w)`` to every pixel of the original frame: ``(T, C, H, W)``."""
    y, x = (torch.arange(side) + 0.5 for side in geometry.frame)
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return resample_to_points(maps, geometry, centres)


def to_image(frame: Tensor) -> Image.Image:
    """Convert a ``(3, H, W)`` uint8 frame to a PIL image."""
    return Image.fromarray(rearrange(frame, "c h w -> h w c").contiguous().cpu().numpy())
