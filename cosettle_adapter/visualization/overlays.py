"""Drawn on the frames they belong to: masks, tracked points, and similarity to a point.

Frames are ``(T, 3, H, W)`` uint8, and so is what is drawn, on the CPU. What does not fit together
is a :class:`FrameError` or :class:`GeometryError`, a number out of range a :class:`ValueError`.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from PIL import Image, ImageDraw
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
    distinct_colours,
    to_image,
)

VOID = 255  # label of pixels that belong to nothing

_FINE = 2  # points are drawn this many times larger, then averaged: Pillow's lines have hard edges
_RIM = (16, 18, 22)
_SIZE = 0.011  # radius of a point, as a share of the frame's short side
_LUMA = (0.299, 0.587, 0.114)
_DIM = 0.7  # of the frame under the heat, so that the brightest thing is the heat
_OPACITY = 0.8  # of the heat at its brightest
_RING = 0.022  # radius of the ring around a peak, as a share of the short side


def overlay_masks(
    frames: Tensor,
    masks: Tensor,
    *,
    geometry: Geometry | None = None,
    opacity: float = 0.45,
    contour: int = 2,
    colours: Tensor | None = None,
) -> Tensor:
    """Tint objects and draw a line along the inside of their edges.

    Args:
        masks: either ids ``(T, H, W)``, integer (0 the background, 255 nothing) or bool; or one
            mask an object, ``(T, K, H, W)``, bool or floats in [0, 1], without the background.
            Soft masks tint by their value; the line follows the most likely object, the
            background having what is left to 1.
        geometry: for masks ``(T, K, h, w)`` on the grid of features, such as label propagation
            returns: how the frames became that grid.
        opacity: of the tint of a full mask, in [0, 1].
        contour: width of the line in pixels; 0 draws none.
        colours: ``(K, 3)`` uint8 RGB; by default :func:`distinct_colours`.
    """
    check_frames(frames, geometry)
    if not 0 <= opacity <= 1 or contour < 0:
        raise ValueError(
            f"got opacity={opacity} and contour={contour}, expected a share in [0, 1] and a width "
            "of 0 or more pixels"
        )
    _check_masks(masks, len(frames), None if geometry else frames.shape[-2:])
    if masks.ndim == 3:
        known = masks[masks != VOID]
        objects = int(known.max()) if known.numel() else 0
        ids = rearrange(torch.arange(1, objects + 1), "k -> k 1 1")
        masks = rearrange(masks, "t h w -> t 1 h w") == ids.to(masks.device)
    palette = _colours(colours, masks.shape[1]).float()
    painted = []
    for picture, mask in zip(frames.cpu().float(), torch.split(masks, 1), strict=True):
        shares = mask.cpu().float().clamp(0, 1)
        shares = shares[0] if geometry is None else at_pixels(shares, geometry)[0]
        shares = shares / shares.sum(0).clamp_min(1)
        tint = opacity * shares
        tinted = picture * (1 - tint.sum(0)) + einsum(tint, palette, "k h w, k c -> c h w")
        if contour:
            background = 1 - shares.sum(0, keepdim=True)
            winner = torch.cat([background, shares]).argmax(0)
            line = _line(winner, contour)
            tinted[:, line] = rearrange(palette[winner[line] - 1], "n c -> c n")
        painted.append(tinted.round().to(torch.uint8))
    return torch.stack(painted)


def draw_tracks(
    frames: Tensor,
    positions: Tensor,
    visible: Tensor | None = None,
    *,
    trail: int = 12,
    radius: float | None = None,
    colours: Tensor | None = None,
) -> Tensor:
    """Draw points with fading trails: discs where they can be seen, rings where they are hidden.

    The trail of a hidden stretch is thin. Points may lie outside the frame or be NaN, and are
    then not drawn.

    Args:
        positions: ``(T, N, 2)`` of (x, y) pixels.
        visible: ``(T, N)`` bool; everything can be seen by default.
        trail: number of past frames a trail reaches back to; 0 for none.
        radius: of a point in pixels; by default about a hundredth of the short side.
        colours: ``(N, 3)`` uint8 RGB; by default :func:`distinct_colours`, in the points' order.
    """
    check_frames(frames)
    length, _, height, width = frames.shape
    if visible is None:
        visible = torch.ones(positions.shape[:-1], dtype=torch.bool)
    right = positions.ndim == 3 and len(positions) == length and positions.shape[-1] == 2
    if not right or visible.shape != positions.shape[:2] or visible.dtype != torch.bool:
        raise FrameError(
            f"got positions of shape {tuple(positions.shape)} and visible of shape "
            f"{tuple(visible.shape)} and dtype {visible.dtype}, expected ({length}, N, 2), pixels "
            f"(x, y), and ({length}, N) bool"
        )
    if trail < 0 or (radius is not None and not radius > 0):
        raise ValueError(
            f"got trail={trail} and radius={radius}, expected 0 or more past frames and a positive "
            "number of pixels"
        )
    radius = _FINE * (radius or max(2.0, _SIZE * min(height, width)))
    palette = [tuple(row) for row in _colours(colours, positions.shape[1]).tolist()]
    known = positions.isfinite().all(dim=-1).tolist()
    places, seen = (_FINE * positions.double()).tolist(), visible.tolist()
    drawn = []
    for t, frame in enumerate(frames):
        ink = Image.new("RGBA", (_FINE * width, _FINE * height))
        draw = ImageDraw.Draw(ink)
        for step in range(max(1, t - trail + 1), t + 1):  # oldest first: the newest lie on top
            fresh = 1 - (t - step) / max(1, trail)
            for n, colour in enumerate(palette):
                if known[step - 1][n] and known[step][n]:
                    thick, dense = (0.7, 0.9) if seen[step][n] else (0.3, 0.6)
                    ends = [*places[step - 1][n], *places[step][n]]
                    fill = (*colour, round(255 * fresh * dense))
                    draw.line(ends, fill=fill, width=max(1, round(thick * radius)))
        rim = max(2, round(0.3 * radius))
        for n, colour in enumerate(palette):
            if known[t][n] and seen[t][n]:
                draw.circle(places[t][n], radius + rim, fill=_RIM)
                draw.circle(places[t][n], radius, fill=colour)
            elif known[t][n]:
                draw.circle(places[t][n], radius + rim, outline=_RIM, width=3 * rim)
                draw.circle(places[t][n], radius, outline=colour, width=rim)
        picture = Image.alpha_composite(to_image(frame).convert("RGBA"), ink.reduce(_FINE))
        drawn.append(image_to_frame(picture))
    return torch.stack(drawn)


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
    """
    if not -len(features) <= frame < len(features):
        raise FrameError(f"got frame={frame} of a clip of {len(features)}, counted from 0")
    (x, y), (height, width) = point, geometry.frame
    if not (0 <= x <= width and 0 <= y <= height):
        raise GeometryError(
            f"got the point ({x:g}, {y:g}), which lies outside the frame of {width} x {height}"
        )
    unit = rearrange(unit_map(features[frame]), "c h w -> 1 c h w")
    where = torch.tensor([[x, y]], dtype=torch.float64)
    query = F.normalize(resample_to_points(unit, geometry, where), dim=1)
    query = rearrange(query, "1 c 1 -> c").to(features.device)
    maps = []
    for each in (one.to(query.dtype) for one in features):  # without a copy of unit length
        along = einsum(each, query, "c h w, c -> h w")
        maps.append((along / each.norm(dim=0).clamp_min(1e-12)).clamp(-1, 1))
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
        maps: ``(T, h, w)`` floats, as :func:`similarity_maps` returns them.
        geometry: how the frames became the maps' grid.
        limits: values at the two ends of the colours, ascending; give several clips the same ones
            to compare them.
        mark_peaks: draw a ring around the most similar patch of every frame.
    """
    check_frames(frames, geometry)
    low, high = limits
    if not low < high:
        raise ValueError(f"got limits={limits}, expected a lower and a higher value")
    if maps.ndim != 3 or len(maps) != len(frames):
        raise FrameError(
            f"got maps of shape {tuple(maps.shape)} for {len(frames)} frames, expected "
            f"({len(frames)}, h, w)"
        )
    radius = max(3.0, _RING * min(geometry.frame))
    luma = torch.tensor(_LUMA)
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
                line = max(1, round(radius * thickness))
                draw.circle(peak, radius * (1 + thickness / 2), outline=colour, width=line)
            heated = image_to_frame(image)
        drawn.append(heated)
    return torch.stack(drawn)


def heat(values: Tensor) -> Tensor:
    """Return values ``(H, W)`` in [0, 1] as uint8 colours and opacity, ``(4, H, W)``."""
    cover = _OPACITY * values * (2 - values)  # rises at once: weak likeness is seen as well
    rgba = [colour_scale(values), (255 * cover).round().to(torch.uint8)[..., None]]
    return rearrange(torch.cat(rgba, dim=-1), "h w c -> c h w")


def _colours(given: Tensor | None, count: int) -> Tensor:
    if given is None:
        return distinct_colours(count)
    if tuple(given.shape) != (count, 3) or given.dtype != torch.uint8:
        raise FrameError(
            f"got colours of shape {tuple(given.shape)} and dtype {given.dtype}, expected "
            f"({count}, 3) uint8: one RGB colour for each"
        )
    return given.cpu()


def _check_masks(masks: Tensor, length: int, sides: tuple[int, ...] | None) -> None:
    """Raise unless they are ids or one mask an object, of these ``sides`` unless on a grid."""
    low, high = (float(end) for end in masks.aminmax()) if masks.numel() else (0.0, 0.0)
    if masks.ndim == 3:
        right = not masks.is_floating_point() and low >= 0
    else:  # half precision sums to a little more than 1
        right = masks.is_floating_point() or masks.dtype == torch.bool
        right = right and masks.ndim == 4 and -1e-3 <= low <= high <= 1 + 1e-3
    if not right or len(masks) != length or sides not in (None, masks.shape[-2:]):
        where = "h, w" if sides is None else f"{sides[0]}, {sides[1]}"
        raise FrameError(
            f"got masks of shape {tuple(masks.shape)} and dtype {masks.dtype} from {low:g} to "
            f"{high:g}, expected ids ({length}, {where}), integers from 0 or bool, or one mask an "
            f"object ({length}, K, {where}), bool or floats in [0, 1]. Masks on the grid of "
            "features need geometry="
        )


def _line(winner: Tensor, width: int) -> Tensor:
    """``(H, W)`` bool: object pixels less than ``width`` away from another object's or none's."""
    ids = rearrange(winner, "h w -> 1 1 h w").float()
    side = 2 * width + 1
    high = F.max_pool2d(ids, side, stride=1, padding=width)
    low = -F.max_pool2d(-ids, side, stride=1, padding=width)
    return rearrange((high != ids) | (low != ids), "1 1 h w -> h w") & (winner > 0)
