"""Colours that readers with any kind of colour vision can tell apart or put in order."""

from __future__ import annotations

import torch
from torch import Tensor

from cosettle_adapter.errors import FrameError

# Okabe and Ito, "Color Universal Design", without black
_DISTINCT = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (204, 121, 167),  # reddish purple
    (213, 94, 0),  # vermillion
    (0, 114, 178),  # blue
)
# nine evenly spaced entries of matplotlib's "inferno" (CC0): lightness rises evenly
_SCALE = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
_DARKEST = 0.35  # share of the scale too dark to be seen as a line


def distinct_colours(count: int) -> Tensor:
    """Return colours for ``count`` things that must not be mistaken for one another.

    Args:
        count: up to seven take the palette of Okabe and Ito, which readers with any kind of
            colour vision tell apart; more are spread over :func:`colour_scale` in their order,
            so that neighbours look alike.

    Returns:
        ``(count, 3)`` uint8 RGB.

    Raises:
        ValueError: a negative ``count``.
    """
    if count < 0:
        raise ValueError(f"got count={count}, expected 0 or more colours.")
    if count <= len(_DISTINCT):
        return torch.tensor(_DISTINCT, dtype=torch.uint8)[:count]
    return colour_scale(torch.linspace(_DARKEST, 1, count))


def colour_scale(values: Tensor) -> Tensor:
    """Map values to colours of rising lightness: black, purple, red, orange, pale yellow.

    Args:
        values: ``(...)`` floats; what lies outside [0, 1] takes the colour of the nearer end.

    Returns:
        ``(..., 3)`` uint8 RGB on the device of ``values``.
    """
    table = torch.tensor(_SCALE, dtype=torch.float32, device=values.device)
    place = values.float().clamp(0, 1) * (len(table) - 1)
    before = place.floor().long().clamp(max=len(table) - 2)
    share = (place - before)[..., None]
    return torch.lerp(table[before], table[before + 1], share).round().to(torch.uint8)


def chosen_colours(colours: Tensor | None, count: int) -> Tensor:
    """Return ``colours`` if they are ``(count, 3)`` uint8, and distinct ones for None.

    Raises:
        FrameError: colours of another number or kind.
    """
    if colours is None:
        return distinct_colours(count)
    if tuple(colours.shape) != (count, 3) or colours.dtype != torch.uint8:
        raise FrameError(
            f"got colours of shape {tuple(colours.shape)} and dtype {colours.dtype}, expected "
            f"({count}, 3) uint8: one RGB colour for each."
        )
    return colours.cpu()
