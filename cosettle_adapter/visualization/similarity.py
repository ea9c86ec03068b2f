"""Where in a clip is what I clicked on? Cosine to one point's feature, as maps and as pictures."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from PIL import ImageDraw
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence.matching import unit_map
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video.arrays import image_to_frame
from cosettle_adapter.video.geometry import Geometry, resample_to_points
from cosettle_adapter.visualization.drawing import (
    at_pixels,
    check_frames,
    colour_scale,
    to_image,
)

_LUMA = (0.299, 0.587, 0.114)
_DIM = 0.7  # of the frame under the heat, so that the brightest thing is the heat
_OPACITY = 0.8  # of the heat at its brightest
_RING = 0.022  # radius of the ring around a peak, as a share of the short side


@torch.no_grad()
def similarity_maps(
    features: Tensor, geometry: Geometry, point: tuple[float, float], *, frame: int = 0
) -> Tensor:
    """Compare every patch of a clip with the feature at one point of one frame.

    The point's feature is read bilinearly between patches of unit length.

    Args:
        features: ``(T, C, h, w)`` floats on the geometry's grid.
        geometry: how the frames became that grid.
        point: (x, y) pixel of the original frame.
        frame: index of the frame the point lies in; negative ones count from the end.

    Returns:
        ``(T, h, w)`` float32 cosines in [-1, 1] on the CPU.

    Raises:
        FrameError, GeometryError: no such frame, a point outside it, or another grid.
    """
    if not -len(features) <= frame < len(features):
        raise FrameError(f"got frame={frame} of a clip of {len(features)}, counted from 0.")
    x, y = point
    height, width = geometry.frame
    if not (0 <= x <= width and 0 <= y <= height):
        raise GeometryError(
            f"got the point ({x:g}, {y:g}), which lies outside the frame of {width} x {height} "
            "pixels."
        )
    unit = rearrange(unit_map(features[frame]), "c h w -> 1 c h w")
    where = torch.tensor([[x, y]], dtype=torch.float64)
    query = F.normalize(resample_to_points(unit, geometry, where), dim=1)
    query = rearrange(query, "1 c 1 -> c").to(features.device)
    maps = []
    for each in features:  # without a copy of unit length
        along = einsum(each.to(query.dtype), query, "c h w, c -> h w")
        maps.append((along / each.to(query.dtype).norm(dim=0).clamp_min(1e-12)).clamp(-1, 1))
    return torch.stack(maps).float().cpu()


def similarity_peaks(maps: Tensor, geometry: Geometry) -> Tensor:
    """Return the pixels (x, y) of the centres of the most similar patches: ``(T, 2)`` float64.

    ``maps`` are ``(T, h, w)`` on the geometry's grid.
    """
    best = rearrange(maps, "t h w -> t (h w)").argmax(dim=1).cpu()
    return rearrange(geometry.cell_centers(), "h w xy -> (h w) xy")[best]


def similarity_frames(
    frames: Tensor,
    maps: Tensor,
    geometry: Geometry,
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    mark_peaks: bool = True,
) -> Tensor:
    """Lay maps over dimmed grey frames as heat: the more similar, the brighter and denser.

    Args:
        frames: ``(T, 3, H, W)`` uint8.
        maps: ``(T, h, w)`` floats, as :func:`similarity_maps` returns them.
        geometry: how the frames became the maps' grid.
        limits: values at the two ends of the colours, ascending; give several clips the same ones
            to compare them.
        mark_peaks: draw a ring around the most similar patch of every frame.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        FrameError, GeometryError: frames, maps and geometry that do not fit together.
    """
    length, height, width = check_frames(frames, geometry)
    low, high = limits
    if maps.ndim != 3 or len(maps) != length:
        raise FrameError(
            f"got maps of shape {tuple(maps.shape)} for {length} frames, expected ({length}, h, w)."
        )
    radius, luma = max(3.0, _RING * min(height, width)), torch.tensor(_LUMA)
    drawn = []
    for frame, each, peak in zip(
        frames.cpu(), maps.float().cpu(), similarity_peaks(maps, geometry).tolist(), strict=True
    ):
        values = rearrange((each - low) / (high - low), "h w -> 1 1 h w").clamp(0, 1)
        rgba = heat(at_pixels(values, geometry)[0, 0])
        grey = _DIM * einsum(frame.float(), luma, "c h w, c -> h w").expand(3, -1, -1)
        heated = torch.lerp(grey, rgba[:3].float(), rgba[3:] / 255).round().to(torch.uint8)
        if mark_peaks:
            image = to_image(heated)
            draw = ImageDraw.Draw(image)
            for thickness, colour in ((0.9, "black"), (0.4, "white")):
                reach = radius * (1 + thickness / 2)
                line = max(1, round(radius * thickness))
                draw.circle(peak, reach, outline=colour, width=line)
            heated = image_to_frame(image)
        drawn.append(heated)
    return torch.stack(drawn)


def heat(values: Tensor) -> Tensor:
    """Return values ``(H, W)`` in [0, 1] as uint8 colours and opacity, ``(4, H, W)``."""
    cover = _OPACITY * values * (2 - values)  # rises at once: weak likeness is seen as well
    rgba = [colour_scale(values), (255 * cover).round().to(torch.uint8)[..., None]]
    return rearrange(torch.cat(rgba, dim=-1), "h w c -> c h w")
