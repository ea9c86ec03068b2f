"""Groups of horizontal bars as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from cosettle_adapter.evaluation.axes import Axis, Scale, svg, text

_BOTTOM = 48.0


def bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    label: str,
    colours: Sequence[int],
    form: str = "{:.3g}",
    width: int = 640,
) -> str:
    """Draw a group of horizontal bars for each name.

    Args:
        names: of the groups, from the top.
        values: kind to a value a group; one that is not finite is written as such.
        title: read out in place of the picture.
        label: what the bars show, with the unit.
        colours: a colour a kind.
        form: format string of the values at the bars' ends.
        width: in pixels, before the page scales it.

    Returns:
        An ``<svg>`` element, as high as it needs.
    """
    thick, gap = 10.0, 10.0
    group = thick * len(values) + gap
    left = min(7.0 * max((len(_short(name)) for name in names), default=0) + 16, width / 2)
    height = round(group * len(names) + _BOTTOM)
    flat = [value for row in values.values() for value in row]
    across = Scale(Axis(label, include=(0.0,)), flat, left, width - 56)
    parts = []
    for pixel, tick in across.ticks():
        parts.append(f'<path class="grid" d="M{pixel:.1f} 0V{height - _BOTTOM}"/>')
        parts.append(text(pixel, height - _BOTTOM + 18, tick))
    zero = across(0.0)
    for index, name in enumerate(names):
        top = index * group + gap / 2
        middle = top + (group - gap) / 2 + 4
        whole = f"<title>{escape(name)}</title>" if _short(name) != name else ""
        parts.append(text(left - 8, middle, _short(name), anchor="end", inside=whole))
        for row, (kind, series) in enumerate(values.items()):
            value, y = series[index], top + row * thick
            finite = math.isfinite(value)
            end = across(value) if finite else zero
            parts.append(
                f'<rect class="k{colours[row]}" x="{min(zero, end):.1f}" y="{y:.1f}" '
                f'width="{abs(end - zero):.1f}" height="{thick - 1.5}"><title>'
                f"{escape(f'{name}, {kind}: {_written(value, form)}')}</title></rect>"
            )
            at = max(zero, end) + 4
            parts.append(text(at, y + thick - 1.5, _written(value, form), anchor="start", size=9))
    parts.append(text((left + width) / 2, height - 8, label))
    return svg(title, width, height, parts)


def _written(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "none"


def _short(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
