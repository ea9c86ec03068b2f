"""Draw masks, tracked points, and the similarity to a point on frames.

Frames are ``(T, 3, H, W)`` uint8, and so are the results, on the CPU. Shapes and dtypes that do not
match are a :class:`FrameError` or :class:`GeometryError`, numbers out of range a
:class:`ValueError`.
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

VOID = 255  # label of pixels to ignore

_OVERSAMPLING = 2  # drawn larger, then averaged, because Pillow's lines have hard edges
_RIM = (16, 18, 22)
_SIZE = 0.011  # radius of a point, as a share of the frame's short side
_LUMA = (0.299, 0.587, 0.114)
_DIM = 0.7  # brightness of the frame under the heat map
_OPACITY = 0.8  # largest opacity of the heat map
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
    """Tint objects and draw contours along the inside of their edges.

    Args:
        masks: either ids ``(T, H, W)``, integer (0 is the background, 255 is ignored) or bool; or
            one mask per object, ``(T, K, H, W)``, bool or floats in [0, 1], without the
            background. The values of soft masks scale the tint; the contour follows the most
            likely object, where the background has the remainder to 1.
        geometry: for masks ``(T, K, h, w)`` on the grid of patches, as label propagation returns
            them: the mapping from frames to that grid.
        opacity: opacity of the tint of a full mask, in [0, 1].
        contour: width of the contour in pixels; 0 draws none.
        colours: ``(K, 3)`` uint8 RGB; by default :func:`distinct_colours`.
    """
    check_frames(frames, geometry)
    if not 0 <= opacity <= 1 or contour < 0:
        raise ValueError(
            f"got opacity={opacity} and contour={contour}, expected an opacity in [0, 1] and a "
            "width of 0 or more pixels"
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
    """Draw points with fading trails: discs for visible points, rings for occluded points.

    Trails are thinner where a point is occluded. Points outside the frame, or NaN, are not drawn.

    Args:
        positions: ``(T, N, 2)`` pixels (x, y).
        visible: ``(T, N)`` bool; by default all points are visible.
        trail: length of trails in frames; 0 draws none.
        radius: radius of a point in pixels; by default about 1 % of the shorter side.
        colours: ``(N, 3)`` uint8 RGB; by default :func:`distinct_colours`.
    """
    check_frames(frames)
    length, _, height, width = frames.shape
    if visible is None:
        visible = torch.ones(positions.shape[:-1], dtype=torch.bool)
    valid = positions.ndim == 3 and len(positions) == length and positions.shape[-1] == 2
    if not valid or visible.shape != positions.shape[:2] or visible.dtype != torch.bool:
        raise FrameError(
            f"got positions of shape {tuple(positions.shape)} and visible of shape "
            f"{tuple(visible.shape)} and dtype {visible.dtype}, expected ({length}, N, 2) pixels "
            f"(x, y) and ({length}, N) bool"
        )
    if trail < 0 or (radius is not None and not radius > 0):
        raise ValueError(
            f"got trail={trail} and radius={radius}, expected 0 or more frames and a positive "
            "number of pixels"
        )
    radius = _OVERSAMPLING * (radius or max(2.0, _SIZE * min(height, width)))
    palette = [tuple(row) for row in _colours(colours, positions.shape[1]).tolist()]
    finite, shown = positions.isfinite().all(dim=-1).tolist(), visible.tolist()
    places = (_OVERSAMPLING * positions.cpu().double()).tolist()  # MPS has no float64
    drawn = []
    for t, frame in enumerate(frames):
        ink = Image.new("RGBA", (_OVERSAMPLING * width, _OVERSAMPLING * height))
        draw = ImageDraw.Draw(ink)
        for step in range(max(1, t - trail + 1), t + 1):  # oldest first: the newest is on top
            fresh = 1 - (t - step) / max(1, trail)
            for n, colour in enumerate(palette):
                if finite[step - 1][n] and finite[step][n]:
                    thickness, opacity = (0.7, 0.9) if shown[step][n] else (0.3, 0.6)
                    ends = [*places[step - 1][n], *places[step][n]]
                    fill = (*colour, round(255 * fresh * opacity))
                    draw.line(ends, fill=fill, width=max(1, round(thickness * radius)))
        rim = max(2, round(0.3 * radius))
        for n, colour in enumerate(palette):
            if finite[t][n] and shown[t][n]:
                draw.circle(places[t][n], radius + rim, fill=_RIM)
                draw.circle(places[t][n], radius, fill=colour)
            elif finite[t][n]:
                draw.circle(places[t][n], radius + rim, outline=_RIM, width=3 * rim)
                draw.circle(places[t][n], radius, outline=colour, width=rim)
        picture = Image.alpha_composite(to_image(frame).convert("RGBA"), ink.reduce(_OVERSAMPLING))
        drawn.append(image_to_frame(picture))
    return torch.stack(drawn)


@torch.no_grad()
def similarity_maps(
    features: Tensor, geometry: Geometry, point: tuple[float, float], *, frame: int = 0
) -> Tensor:
    """Compute the cosine similarity of every patch of a clip to one point of one frame.

    The point's feature is interpolated bilinearly between patches of unit length.

    Args:
        features: ``(T, C, h, w)`` floats on the geometry's grid.
        geometry: the mapping from frames to that grid.
        point: (x, y) pixel of the original frame.
        frame: index of the point's frame; negative indices count from the end.

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
    for tokens in features:  # frame by frame, without a normalised copy of the clip
        tokens = tokens.to(query.dtype)
        products = einsum(tokens, query, "c h w, c -> h w")
        maps.append((products / tokens.norm(dim=0).clamp_min(1e-12)).clamp(-1, 1))
    return torch.stack(maps).float().cpu()


def similarity_peaks(maps: Tensor, geometry: Geometry) -> Tensor:
    """Return the centres (x, y) of the most similar patches in pixels: ``(T, 2)`` float64.

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
    """Overlay dimmed grey frames with heat maps: higher values are brighter and more opaque.

    Args:
        maps: ``(T, h, w)`` floats, as :func:`similarity_maps` returns them.
        geometry: the mapping from frames to the maps' grid.
        limits: lowest and highest value of the colour scale; use the same for clips to compare.
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
    for frame, values, peak in zip(
        frames.cpu(), maps.float().cpu(), similarity_peaks(maps, geometry).tolist(), strict=True
    ):
        scaled = rearrange((values - low) / (high - low), "h w -> 1 1 h w").clamp(0, 1)
        rgba = heat(at_pixels(scaled, geometry)[0, 0])
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
    """Map values ``(H, W)`` in [0, 1] to ``(4, H, W)`` uint8 RGBA."""
    opacity = _OPACITY * values * (2 - values)  # rises steeply, so weak similarity is visible
    alpha = rearrange((255 * opacity).round().to(torch.uint8), "h w -> 1 h w")
    return torch.cat([rearrange(colour_scale(values), "h w c -> c h w"), alpha])


def _colours(given: Tensor | None, count: int) -> Tensor:
    if given is None:
        return distinct_colours(count)
    if tuple(given.shape) != (count, 3) or given.dtype != torch.uint8:
        raise FrameError(
            f"got colours of shape {tuple(given.shape)} and dtype {given.dtype}, expected "
            f"({count}, 3) uint8 RGB"
        )
    return given.cpu()


def _check_masks(masks: Tensor, length: int, sides: tuple[int, ...] | None) -> None:
    """Raise unless masks are ids or one per object, of these ``sides`` unless on a grid."""
    low, high = (float(end) for end in masks.aminmax()) if masks.numel() else (0.0, 0.0)
    if masks.ndim == 3:
        valid = not masks.is_floating_point() and low >= 0
    else:  # half precision may exceed 1 slightly
        valid = masks.is_floating_point() or masks.dtype == torch.bool
        valid = valid and masks.ndim == 4 and -1e-3 <= low <= high <= 1 + 1e-3
    if not valid or len(masks) != length or sides not in (None, masks.shape[-2:]):
        where = "h, w" if sides is None else f"{sides[0]}, {sides[1]}"
        raise FrameError(
            f"got masks of shape {tuple(masks.shape)} and dtype {masks.dtype} from {low:g} to "
            f"{high:g}, expected ids ({length}, {where}), integers from 0 or bool, or one mask "
            f"per object ({length}, K, {where}), bool or floats in [0, 1]. Masks on the grid of "
            "patches need geometry="
        )


def _line(winner: Tensor, width: int) -> Tensor:
    """``(H, W)`` bool: object pixels up to ``width`` away from pixels of another id."""
    ids = rearrange(winner, "h w -> 1 1 h w").float()
    side = 2 * width + 1
    high = F.max_pool2d(ids, side, stride=1, padding=width)
    low = -F.max_pool2d(-ids, side, stride=1, padding=width)
    return rearrange((high != ids) | (low != ids), "1 1 h w -> h w") & (winner > 0)
