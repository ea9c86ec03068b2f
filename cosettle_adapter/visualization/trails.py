"""Tracked points drawn on their frames, each with the way it came."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require
from cosettle_adapter.visualization.colours import chosen_colours
from cosettle_adapter.visualization.pixels import check_frames

_FINE = 2  # drawn this many times larger, then averaged: Pillow's lines have hard edges
_RIM = (16, 18, 22)
_SIZE = 0.011  # radius of a point, as a share of the frame's short side


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
        colours: ``(N, 3)`` uint8 RGB; by default those of
            :func:`~cosettle_adapter.visualization.distinct_colours`, in the points' order.

    Returns:
        ``(T, 3, H, W)`` uint8 on the CPU.

    Raises:
        FrameError: frames, positions, visibility or colours that do not go together.
        ValueError: a negative trail or a radius that is not positive.
        MissingExtraError: Pillow or numpy is not installed.
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
    radius = max(2.0, _SIZE * min(height, width)) if radius is None else radius
    palette = [tuple(row) for row in chosen_colours(colours, positions.shape[1]).tolist()]
    places, seen = positions.detach().cpu().double(), visible.cpu()
    drawn = []
    for t, frame in enumerate(frames.cpu()):
        past = slice(max(0, t - trail), t + 1)
        drawn.append(_composed(frame, places[past], seen[past], palette, trail, radius))
    return torch.stack(drawn)


def _composed(
    frame: Tensor,
    places: Tensor,
    seen: Tensor,
    palette: list[tuple[int, ...]],
    trail: int,
    radius: float,
) -> Tensor:
    """One frame under the last ``(t, N, 2)`` places, the newest of them its own."""
    purpose = "drawing tracks"
    image_module = require("PIL.Image", extra="viz", purpose=purpose)
    draw_module = require("PIL.ImageDraw", extra="viz", purpose=purpose)
    numpy = require("numpy", extra="viz", purpose=purpose)
    picture = image_module.fromarray(rearrange(frame, "c h w -> h w c").contiguous().numpy())
    ink = image_module.new("RGBA", tuple(_FINE * side for side in picture.size), (0, 0, 0, 0))
    draw = draw_module.Draw(ink)
    pens = [_Pen(draw, colour, _FINE * radius) for colour in palette]
    points = (_FINE * places).tolist()
    shown = seen.tolist()
    known = places.isfinite().all(dim=-1).tolist()
    for step in range(1, len(points)):  # oldest first, so that the newest lie on top
        age = len(points) - 1 - step
        for n, pen in enumerate(pens):
            if known[step - 1][n] and known[step][n]:
                fresh = 1 - age / max(1, trail)
                pen.line(points[step - 1][n], points[step][n], fresh, shown[step][n])
    for n, pen in enumerate(pens):
        if known[-1][n]:
            pen.point(points[-1][n], shown[-1][n])
    picture = image_module.alpha_composite(picture.convert("RGBA"), ink.reduce(_FINE))
    array = numpy.array(picture.convert("RGB"))
    return rearrange(torch.from_numpy(array), "h w c -> c h w")


class _Pen:
    """Draws one point's marks on the enlarged ink."""

    def __init__(self, draw: Any, colour: tuple[int, ...], radius: float) -> None:
        self.draw, self.colour, self.radius = draw, colour, radius

    def line(self, start: list[float], end: list[float], fresh: float, seen: bool) -> None:
        width = max(1, round(self.radius * (0.7 if seen else 0.3)))
        opacity = round(255 * fresh * (0.9 if seen else 0.6))
        self.draw.line([*start, *end], fill=(*self.colour, opacity), width=width)

    def point(self, centre: list[float], seen: bool) -> None:
        rim, outer = max(2, round(0.3 * self.radius)), self.radius
        if seen:
            self._circle(centre, outer + rim, fill=(*_RIM, 255))
            self._circle(centre, outer, fill=(*self.colour, 255))
            return
        for reach, width, colour in ((outer + rim, 3 * rim, _RIM), (outer, rim, self.colour)):
            self._circle(centre, reach, outline=(*colour, 255), width=width)

    def _circle(self, centre: list[float], reach: float, **options: Any) -> None:
        x, y = centre
        self.draw.ellipse([x - reach, y - reach, x + reach, y + reach], **options)
