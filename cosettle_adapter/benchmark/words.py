"""Rows as words: for the terminal, and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADERS = ("what", "ours", "beside it", "figure", "95 %", "target", "met")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row, as JSON has it, under :data:`HEADERS`."""
    figure, form = row["figure"], row["form"]
    other = row["other"]
    return (
        row["what"],
        spread(row["ours"], row["unit"]),
        "" if other is None else spread(other, row["unit"]),
        measured(row),
        f"{form.format(figure['low'])} to {form.format(figure['high'])}",
        bound(row),
        {True: "yes", False: "no", None: ""}[row["met"]],
    )


def measured(row: Mapping[str, Any]) -> str:
    """Return the figure of a row as words."""
    words: str = row["form"].format(row["figure"]["value"])
    return words


def bound(row: Mapping[str, Any]) -> str:
    """Return the target of a row as words: ``≥ 5.00 x as fast``, or nothing."""
    target = row["target"]
    if target is None:
        return ""
    words: str = row["form"].format(target["value"])
    return f"{'≥' if target['at_least'] else '≤'} {words}"


def spread(values: Mapping[str, Any], unit: str) -> str:
    """Return a median with its quartiles: ``12.3 (12.1 to 12.6) ms``."""
    low, median, high = (number(values[name]) for name in ("low", "median", "high"))
    if unit.startswith("of "):
        return ""  # the figure says it
    return f"{median} ({low} to {high}) {unit}"


def number(value: float) -> str:
    """Return a number with three digits that matter, without an exponent where it is short."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
