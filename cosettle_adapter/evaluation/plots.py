"""Plots as SVG text: no dependency, no file, no script; a page's style sheet colours them.

Marks carry the classes ``k0`` to ``k5`` for their colour; see :data:`STYLE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from cosettle_adapter.evaluation.axes import Axis, Scale, svg, text

COLOURS = 6

STYLE = """
:root {
  --k0: #8b9099; --k1: #b0578f; --k2: #c07a12; --k3: #1f5fbf; --k4: #2b8a5f; --k5: #6b4fc0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --k0: #9a9da5; --k1: #dc93c4; --k2: #e3ab52; --k3: #8db8ff; --k4: #6fcb9f; --k5: #b3a0f5;
  }
}
svg.plot { display: block; width: 100%; min-width: 30rem; height: auto; font-size: 12px; }
svg.plot text { fill: var(--quiet); font-family: inherit; font-variant-numeric: tabular-nums; }
svg.plot .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg.plot .level { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 4 4; fill: none; }
svg.plot .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg.plot .links { fill: none; stroke: var(--quiet); stroke-width: 0.75; opacity: 0.35; }
svg.plot .faint { opacity: 0.45; }
svg.plot .ring { stroke: var(--paper); stroke-width: 2; }
""" + "".join(
    f"svg.plot .k{i} {{ fill: var(--k{i}); }} svg.plot .line.k{i} {{ fill: none; "
    f"stroke: var(--k{i}); }} .chip.k{i}::before {{ background: var(--k{i}); }}\n"
    for i in range(COLOURS)
)

_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 12.0, 48.0


@dataclass(frozen=True)
class Mark:
    """Points of a plot; those with a value that is not finite are left out.

    Attributes:
        x: their x.
        y: their y, as many.
        kind: ``dots``, faint ``cloud`` dots, a ``line`` through them, or ``links`` that join
            each even one with the next.
        colour: 0 to 5.
        titles: shown for a dot under the pointer; as many as points, or none.
        radius: of dots.
    """

    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["dots", "cloud", "line", "links"] = "dots"
    colour: int = 0
    titles: Sequence[str] = ()
    radius: float = 3.0


def plot(
    marks: Sequence[Mark],
    *,
    title: str,
    x: Axis,
    y: Axis,
    level: float | None = None,
    width: int = 640,
    height: int = 400,
) -> str:
    """Draw points and lines over two axes.

    Args:
        marks: drawn in order, the last on top.
        title: read out in place of the picture.
        x: horizontal axis.
        y: vertical axis.
        level: y of a dashed line across.
        width: in pixels, before the page scales it.
        height: likewise.

    Returns:
        An ``<svg>`` element.
    """
    include = y if level is None else Axis(y.label, y.log, (*y.include, level))
    across = Scale(x, [v for m in marks for v in m.x], _LEFT, width - _RIGHT)
    up = Scale(include, [v for m in marks for v in m.y], height - _BOTTOM, _TOP)
    parts = []
    for pixel, label in across.ticks():
        parts.append(f'<path class="grid" d="M{pixel:.1f} {_TOP}V{height - _BOTTOM}"/>')
        parts.append(text(pixel, height - _BOTTOM + 18, label))
    for pixel, label in up.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT} {pixel:.1f}H{width - _RIGHT}"/>')
        parts.append(text(_LEFT - 8, pixel + 4, label, anchor="end"))
    if level is not None and up.takes(level):
        parts.append(f'<path class="level" d="M{_LEFT} {up(level):.1f}H{width - _RIGHT}"/>')
    parts.append(text((_LEFT + width - _RIGHT) / 2, height - 8, x.label))
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(text(14, middle, y.label, turn=True))
    parts += [_mark(mark, across, up) for mark in marks]
    return svg(title, width, height, parts)


def legend(names: Mapping[str, int]) -> str:
    """Name colours, as HTML to stand beside a plot."""
    chips = "".join(
        f'<span class="chip k{colour}">{escape(name)}</span>' for name, colour in names.items()
    )
    return f'<p class="legend">{chips}</p>'


def _mark(mark: Mark, across: Scale, up: Scale) -> str:
    shown = [
        (across(x), up(y), index)
        for index, (x, y) in enumerate(zip(mark.x, mark.y, strict=True))
        if across.takes(x) and up.takes(y)
    ]
    if mark.kind == "line":
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in shown)
        return f'<polyline class="line k{mark.colour}" points="{path}"/>'
    if mark.kind == "links":
        at = {index: f"{x:.1f} {y:.1f}" for x, y, index in shown}
        ends = [(at.get(i), at.get(i + 1)) for i in range(0, len(mark.x) - 1, 2)]
        path = "".join(f"M{a}L{b}" for a, b in ends if a and b)
        return f'<path class="links" d="{path}"/>'
    look = "faint" if mark.kind == "cloud" else "ring"
    dots = []
    for x, y, index in shown:
        title = f"<title>{escape(mark.titles[index])}</title>" if mark.titles else ""
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{mark.radius:g}">{title}</circle>')
    return f'<g class="{look} k{mark.colour}">{"".join(dots)}</g>'
