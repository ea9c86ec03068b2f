"""Axes of plots, and the SVG they are written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LEAST = 1e-300  # powers of ten below it are not exact
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """An axis of a plot.

    Attributes:
        label: what it shows, with the unit.
        log: decades in place of equal steps; values that are not positive are left out.
        include: values that must lie on it.
    """

    label: str
    log: bool = False
    include: tuple[float, ...] = ()


class Scale:
    """Values of an axis to pixels between ``start`` and ``stop``."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, stop: float) -> None:
        self.axis, self.start, self.stop = axis, start, stop
        inner = [self._inner(value) for value in (*values, *axis.include) if self.takes(value)]
        low, high = (min(inner), max(inner)) if inner else (0.0, 1.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = 0.5 if axis.log else abs(low) * 0.5 or 0.5
            low, high = low - room, high + room
        room = (high - low) * 0.04
        fixed = [self._inner(value) for value in axis.include if self.takes(value)]
        self.low = low if low in fixed else low - room
        self.high = high if high in fixed else high + room

    def takes(self, value: float) -> bool:
        """Whether the axis can show a value."""
        return math.isfinite(value) and (value > _LEAST or not self.axis.log)

    def __call__(self, value: float) -> float:
        """Pixels of a value that the axis takes."""
        share = (self._inner(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and labels."""
        if not self.axis.log:
            return [(self(value), f"{value:.6g}") for value in _steps(self.low, self.high)]
        decades = _decades(self.low, self.high)
        if len(decades) > 1:
            return [(self(10.0**v), f"10{str(v).translate(_SUPERSCRIPTS)}") for v in decades]
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        inside = [v for v in values if self.low <= math.log10(v) <= self.high]
        return [(self(value), f"{value:.6g}") for value in inside]

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value


def svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """Put parts together; the title is read out in place of the picture."""
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "middle",
    turn: bool = False,
    size: int | None = None,
    inside: str = "",
) -> str:
    """Write words at a point; ``inside`` is SVG that goes into the element."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    sized = f' font-size="{size}"' if size else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}{sized}>'
        f"{escape(words)}{inside}</text>"
    )


def _steps(low: float, high: float, wanted: int = 6) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decades(low: float, high: float, most: int = 8) -> list[int]:
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    return list(range(first, last + 1, max(1, math.ceil((last - first + 1) / most))))
