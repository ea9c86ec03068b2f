"""Smooth paths of similarities: what a camera does over a photograph, and an object before it."""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Generator, Tensor

_FULL_TURN = 2 * math.pi


def camera_path(
    count: int, sides: tuple[int, int], motion: str, amount: float, generator: Generator
) -> Tensor:
    """Draw a camera's path.

    Args:
        count: number of frames.
        sides: (H, W) of the frames.
        motion: ``"pan"``, ``"zoom"``, ``"rotate"`` or ``"mixed"``.
        amount: how far, as :func:`render_clip` defines it.
        generator: source of directions and centres.

    Returns:
        (count, 3, 3) float64 similarities from pixels (x, y, 1) of each frame to a plane on which
        no frame pixel is larger than one unit.
    """
    height, width = sides
    direction, pivot_x, pivot_y, zoom_sign, turn_sign = _uniform(5, generator)
    along, sideways = _progress(count, generator)
    offset = torch.zeros(count, 2, dtype=torch.float64)
    factor, angle = torch.ones_like(along), torch.zeros_like(along)
    if motion in ("pan", "mixed"):
        offset = amount * min(sides) * _curve(along, 0.2 * sideways, _FULL_TURN * direction)
    if motion in ("zoom", "mixed"):
        factor = torch.exp(_sign(zoom_sign) * math.log1p(amount) * along)
        factor = factor / factor.max()
    if motion in ("rotate", "mixed"):
        angle = _sign(turn_sign) * amount * along
    pivot = torch.tensor([width * (0.35 + 0.3 * pivot_x), height * (0.35 + 0.3 * pivot_y)])
    return _similarities(offset, factor, angle, pivot.to(torch.float64))


def object_path(
    count: int,
    sides: tuple[int, int],
    cutout: tuple[int, int],
    amount: float,
    generator: Generator,
) -> Tensor:
    """Draw the path of a cut-out across the frame; its centre stays inside the frame.

    Args:
        count: number of frames.
        sides: (H, W) of the frames.
        cutout: (h, w) of the cut-out.
        amount: how far, as :func:`render_clip` defines it.
        generator: source of directions and places.

    Returns:
        (count, 3, 3) float64 similarities from pixels (x, y, 1) of the cut-out to each frame;
        none enlarges the cut-out.
    """
    height, width = sides
    direction, start_x, start_y, grow_sign, turn_sign = _uniform(5, generator)
    along, sideways = _progress(count, generator)
    reach = min(0.4, amount) * min(sides)
    place = torch.tensor([width * (0.4 + 0.2 * start_x), height * (0.4 + 0.2 * start_y)])
    curve = _curve(along - 0.5, 0.2 * sideways, _FULL_TURN * direction)
    factor = torch.exp(_sign(grow_sign) * 0.3 * amount * along)
    angle = _sign(turn_sign) * 0.5 * amount * along
    centre = torch.tensor([cutout[1] / 2, cutout[0] / 2], dtype=torch.float64)
    return _similarities(place + reach * curve, factor / factor.max(), angle, centre)


def apply_homographies(matrices: Tensor, points: Tensor) -> Tensor:
    """Map points by each of several homographies.

    Args:
        matrices: (T, 3, 3) float64.
        points: (N, 2) float64.

    Returns:
        (T, N, 2) float64.
    """
    homogeneous = torch.cat((points, torch.ones_like(points[:, :1])), dim=-1)
    mapped = einsum(matrices, homogeneous, "t i j, n j -> t n i")
    return mapped[..., :2] / mapped[..., 2:]


def _progress(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rise from 0 to 1 at a varying speed, and a swing out and back of height 1."""
    time = torch.linspace(0, 1, count, dtype=torch.float64)
    phase = _FULL_TURN * _uniform(1, generator)[0]
    sway = (torch.sin(_FULL_TURN * time + phase) - math.sin(phase)) / _FULL_TURN
    return time + 0.5 * sway, torch.sin(_FULL_TURN * time)


def _curve(along: Tensor, across: Tensor, direction: float) -> Tensor:
    cos, sin = math.cos(direction), math.sin(direction)
    return torch.stack((cos * along - sin * across, sin * along + cos * across), dim=-1)


def _similarities(offset: Tensor, factor: Tensor, angle: Tensor, pivot: Tensor) -> Tensor:
    """Matrices of ``x -> offset + factor * rotation(angle) @ (x - pivot)``."""
    matrices = torch.zeros(len(factor), 3, 3, dtype=torch.float64)
    matrices[:, 0, 0] = matrices[:, 1, 1] = factor * torch.cos(angle)
    matrices[:, 1, 0] = factor * torch.sin(angle)
    matrices[:, 0, 1] = -matrices[:, 1, 0]
    matrices[:, :2, 2] = offset - einsum(matrices[:, :2, :2], pivot, "t i j, j -> t i")
    matrices[:, 2, 2] = 1
    return matrices


def _uniform(count: int, generator: Generator) -> list[float]:
    draws: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return draws


def _sign(draw: float) -> float:
    return 1.0 if draw < 0.5 else -1.0
