"""Masks and tracked points drawn on the frames they belong to."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.arrays import image_to_frame
from cosettle_adapter.video.geometry import Geometry
from cosettle_adapter.visualization.drawing import (
    at_pixels,
    check_frames,
    chosen_colours,
    to_image,
)

VOID = 255  # label of pixels that belong to nothing

_FINE = 2  # points are drawn this many times larger, then averaged: Pillow's lines have hard edges
_RIM = (16, 18, 22)
_SIZE = 0.011  # radius of a point, as a share of the frame's short side


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
        frames: ``(T, 3, H, W)`` uint8.
        masks: either ids ``(T, H, W)``, integer (0 the background, 255 nothing) or bool; or one
            mask an object, ``(T, K, H, W)``, bool or floats in [0, 1], without the background.
            Soft masks tint by their value; the line follows the most likely object, the
            background having what is left to 1.
        geometry: for masks ``(T, K, h, w)`` on the grid of features, such as label propagation
            returns: how the frames became that grid.
        opacity: of the tint of a full mask, in [0, 1].
        contour: width of the line in pixels; 0 draws none.
        colours: ``(K, 3)`` uint8 RGB; by default :func:`distinct_colours`.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        FrameError, GeometryError, ValueError: what does not fit together, or is out of range.
    """
    length, height, width = check_frames(frames, geometry)
    if not 0 <= opacity <= 1:
        raise ValueError(f"got opacity={opacity}, expected a share in [0, 1].")
    if contour < 0:
        raise ValueError(f"got contour={contour}, expected a width of 0 or more pixels.")
    objects = _count_objects(masks, length, None if geometry else (height, width))
    palette = chosen_colours(colours, objects).float()
    if masks.ndim == 3:
        ids = rearrange(torch.arange(1, objects + 1, device=masks.device), "k -> k 1 1")
        masks = rearrange(masks, "t h w -> t 1 h w") == ids
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
        frames: ``(T, 3, H, W)`` uint8.
        positions: ``(T, N, 2)`` of (x, y) pixels.
        visible: ``(T, N)`` bool; everything can be seen by default.
        trail: number of past frames a trail reaches back to; 0 for none.
        radius: of a point in pixels; by default about a hundredth of the short side.
        colours: ``(N, 3)`` uint8 RGB; by default :func:`distinct_colours`, in the points' order.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        FrameError, ValueError: what does not fit together, or is out of range.
    """
    length, height, width = check_frames(frames)
    if positions.ndim != 3 or len(positions) != length or positions.shape[-1] != 2:
        raise FrameError(
            f"got positions of shape {tuple(positions.shape)} for {length} frames, expected "
            f"({length}, N, 2) of (x, y) pixels."
        )
    if visible is None:
        visible = torch.ones(positions.shape[:2], dtype=torch.bool)
    if visible.shape != positions.shape[:2] or visible.dtype != torch.bool:
        raise FrameError(
            f"got visible of shape {tuple(visible.shape)} and dtype {visible.dtype}, expected "
            f"{tuple(positions.shape[:2])} bool, as there are positions."
        )
    if trail < 0:
        raise ValueError(f"got trail={trail}, expected 0 or more past frames.")
    if radius is not None and not radius > 0:
        raise ValueError(f"got radius={radius}, expected a positive number of pixels.")
    radius = _FINE * (max(2.0, _SIZE * min(height, width)) if radius is None else radius)
    palette = [tuple(row) for row in chosen_colours(colours, positions.shape[1]).tolist()]
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
        for n, colour in enumerate(palette):
            if known[t][n]:
                _draw_point(draw, places[t][n], radius, colour, hidden=not seen[t][n])
        picture = Image.alpha_composite(to_image(frame).convert("RGBA"), ink.reduce(_FINE))
        drawn.append(image_to_frame(picture.convert("RGB")))
    return torch.stack(drawn)


def _draw_point(
    draw: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, ...],
    *,
    hidden: bool,
) -> None:
    """Draw a disc with a dark rim; of a hidden point, a ring with dark rims."""
    rim = max(2, round(0.3 * radius))
    if hidden:
        draw.circle(centre, radius + rim, outline=_RIM, width=3 * rim)
        draw.circle(centre, radius, outline=colour, width=rim)
    else:
        draw.circle(centre, radius + rim, fill=_RIM)
        draw.circle(centre, radius, fill=colour)


def _count_objects(masks: Tensor, length: int, sides: tuple[int, int] | None) -> int:
    """Return the number of objects ``K``; ``sides`` are those of masks that are no grid."""
    if masks.ndim == 3:
        right_kind = not masks.is_floating_point()
    else:  # half precision sums to a little more than 1
        low, high = (-1e-3, 1 + 1e-3) if masks.is_floating_point() else (0, 1)
        right_kind = masks.is_floating_point() or masks.dtype == torch.bool
        right_kind = right_kind and bool(((masks >= low) & (masks <= high)).all())
    right_sides = sides is None or tuple(masks.shape[-2:]) == sides
    if masks.ndim not in (3, 4) or len(masks) != length or not (right_kind and right_sides):
        where = "h, w" if sides is None else f"{sides[0]}, {sides[1]}"
        raise FrameError(
            f"got masks of shape {tuple(masks.shape)} and dtype {masks.dtype}, expected ids "
            f"({length}, {where}), integer or bool, or one mask an object ({length}, K, {where}), "
            "bool or floats in [0, 1]. Masks on the grid of features need geometry=."
        )
    if masks.ndim == 4:
        return masks.shape[1]
    known = masks[masks != VOID].int()
    if known.numel() and int(known.min()) < 0:
        raise FrameError(f"got the mask id {int(known.min())}, expected 0 for the background.")
    return int(known.max()) if known.numel() else 0


def _line(winner: Tensor, width: int) -> Tensor:
    """``(H, W)`` bool: object pixels less than ``width`` away from another object's or none's."""
    ids = rearrange(winner, "h w -> 1 1 h w").float()
    side = 2 * width + 1
    high = F.max_pool2d(ids, side, stride=1, padding=width)
    low = -F.max_pool2d(-ids, side, stride=1, padding=width)
    return rearrange((high != ids) | (low != ids), "1 1 h w -> h w") & (winner > 0)
