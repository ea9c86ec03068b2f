"""The sides of a frame that cut into patches without remainder: ``patch + k * stride``."""

from __future__ import annotations

import math
import operator
from typing import Any

from cosettle_adapter.errors import GeometryError

_FITS = ("resize", "pad")


def whole(length: float) -> int:
    """Round to the nearest whole number, halves up."""
    return math.floor(length + 0.5)


def nearest_valid(length: float, patch: int, stride: int) -> int:
    """Return the valid side nearest to a length; the larger of two equally near."""
    return patch + stride * max(0, whole((length - patch) / stride))


def next_valid(side: int, patch: int, stride: int) -> int:
    """Return the smallest valid side that is at least ``side``."""
    return patch + stride * max(0, -((patch - side) // stride))


def check_steps(patch: int, stride: int, fit: str) -> tuple[int, int]:
    """Return (patch, stride) as ints, or say why they or ``fit`` cannot be used."""
    patch, stride = check_side("patch", patch), check_side("stride", stride)
    if stride > patch:
        raise GeometryError(
            f"stride {stride} is larger than patch {patch} and would skip pixels; "
            f"use a stride from 1 to {patch}"
        )
    if fit not in _FITS:
        raise GeometryError(f"got fit={fit!r}, expected 'resize' or 'pad'")
    return patch, stride


def as_sides(name: str, sides: Any) -> tuple[int, int]:
    """Return (height, width) as ints, or say what ``name`` should have been."""
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise GeometryError(f"{name} must be (height, width), got {sides!r}")
    return check_side(f"{name} height", sides[0]), check_side(f"{name} width", sides[1])


def check_side(name: str, side: Any) -> int:
    """Return ``side`` as an int of at least 1, or say what ``name`` should have been."""
    try:
        length = operator.index(side)
    except TypeError:
        length = 0
    if length < 1:
        raise GeometryError(f"{name} must be a whole number of at least 1, got {side!r}")
    return length


def check_valid(name: str, side: int, patch: int, stride: int) -> None:
    """Raise unless ``side`` is valid, naming the two valid sides around it."""
    below = patch + stride * max(0, (side - patch) // stride)
    if side != below:
        raise GeometryError(
            f"{name} {side} is not patch + k * stride for patch {patch} and stride {stride}; "
            f"the nearest that are: {below} and {below + stride}"
        )
