"""Where in a clip is what I clicked on? Cosine to one point's feature, as maps and as pictures."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence.matching import unit_map
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video.geometry import Geometry, resample_to_points
from cosettle_adapter.visualization.colours import colour_scale
from cosettle_adapter.visualization.pixels import (
    FRAMES_AT_ONCE,
    at_pixels,
    check_frames,
    check_geometry,
    pixel_centres,
)

_LUMA = (0.299, 0.587, 0.114)
_DIM = 0.7  # of the frame under the heat, so that the brightest thing is the heat
_RING = 0.022  # radius of the ring around a peak, as a share of the short side


@torch.no_grad()
def similarity_maps(
    features: Tensor, geometry: Geometry, point: tuple[float, float], *, frame: int = 0
) -> Tensor:
    """Compare every cell of a clip with the feature at one point of one frame.

    The point's feature is read bilinearly between cells of unit length.

    Args:
        features: ``(T, C, h, w)`` floats on the geometry's grid.
        geometry: how the frames became that grid.
        point: (x, y) pixel of the original frame.
        frame: index of the frame the point lies in; negative ones count from the end.

    Returns:
        ``(T, h, w)`` float32 cosines in [-1, 1] on the CPU.

    Raises:
        FrameError: no such frame.
        GeometryError: a point outside the frame, or features on another grid.
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
    maps = [_cosine(each, rearrange(query, "1 c 1 -> c")) for each in features]
    return torch.stack(maps).cpu()


def similarity_peaks(maps: Tensor, geometry: Geometry) -> Tensor:
    """Return the pixel (x, y) of the most similar cell's centre in every frame.

    Args:
        maps: ``(T, h, w)`` on the geometry's grid.
        geometry: how the frames became that grid.

    Returns:
        ``(T, 2)`` float64 pixels of the original frame.
    """
    best = rearrange(maps, "t h w -> t (h w)").argmax(dim=1).cpu()
    return rearrange(geometry.cell_centers(), "h w xy -> (h w) xy")[best]


def similarity_frames(
    frames: Tensor,
    maps: Tensor,
    geometry: Geometry,
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    opacity: float = 0.8,
    mark_peaks: bool = True,
) -> Tensor:
    """Lay maps over dimmed grey frames as heat: the more similar, the brighter and denser.

    Args:
        frames: ``(T, 3, H, W)`` uint8.
        maps: ``(T, h, w)`` floats, as :func:`similarity_maps` returns them.
        geometry: how the frames became the maps' grid.
        limits: values at the two ends of the colours; give several clips the same ones to
            compare them.
        opacity: of the heat at its brightest, in [0, 1].
        mark_peaks: draw a ring around the most similar cell of every frame.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        FrameError: frames of another kind, or another number of maps.
        GeometryError: frames or maps of another size than the geometry's.
        ValueError: limits that are not ascending, or an opacity outside [0, 1].
    """
    length, height, width = check_frames(frames)
    check_geometry(frames, geometry)
    low, high = limits
    if not low < high:
        raise ValueError(f"got limits={limits}, expected a lower and a higher value.")
    if not 0 <= opacity <= 1:
        raise ValueError(f"got opacity={opacity}, expected a share in [0, 1].")
    if maps.ndim != 3 or len(maps) != length:
        raise FrameError(
            f"got maps of shape {tuple(maps.shape)} for {length} frames, expected ({length}, h, w)."
        )
    values = rearrange((maps.float().cpu() - low) / (high - low), "t h w -> t 1 h w").clamp(0, 1)
    painted = []
    chunks = (torch.split(clip, FRAMES_AT_ONCE) for clip in (frames.cpu(), values))
    for pictures, chunk in zip(*chunks, strict=True):
        fine = rearrange(at_pixels(chunk, geometry), "t 1 h w -> t h w")
        heated = [_heated(*each, opacity) for each in zip(pictures, fine, strict=True)]
        painted.append(torch.stack(heated))
    drawn = torch.cat(painted)
    if mark_peaks:
        centres = pixel_centres(height, width)
        radius = max(3.0, _RING * min(height, width))
        for picture, peak in zip(drawn, similarity_peaks(maps, geometry), strict=True):
            _draw_ring(picture, (centres - peak).norm(dim=-1), radius)
    return drawn


def _heated(picture: Tensor, values: Tensor, opacity: float) -> Tensor:
    """A frame ``(3, H, W)``, dimmed and grey, under the heat of ``(H, W)`` values in [0, 1]."""
    grey = _DIM * einsum(picture.float(), torch.tensor(_LUMA), "c h w, c -> h w")
    colours = rearrange(colour_scale(values), "h w c -> c h w").float()
    cover = opacity * values * (2 - values)  # rises at once: weak likeness is seen as well
    return torch.lerp(grey.expand_as(colours), colours, cover).round().to(torch.uint8)


def _cosine(features: Tensor, query: Tensor) -> Tensor:
    """Cosine of every cell ``(C, h, w)`` with a unit ``(C,)``, without a copy of unit length."""
    features = features.to(query.dtype)
    along = einsum(features, query.to(features.device), "c h w, c -> h w")
    cosine: Tensor = along / features.norm(dim=0).clamp_min(1e-12)
    return cosine.clamp(-1, 1).float()


def _draw_ring(picture: Tensor, distance: Tensor, radius: float) -> None:
    """Draw a white ring with dark rims into ``(3, H, W)`` uint8, with soft edges."""
    near = distance < 2 * radius + 1
    for width, value in ((radius / 2.2, 0.0), (radius / 5, 255.0)):
        cover = (width + 0.5 - (distance[near] - radius).abs()).clamp(0, 1).float()
        inked = torch.lerp(picture[:, near].float(), torch.tensor(value), cover)
        picture[:, near] = inked.round().to(torch.uint8)
