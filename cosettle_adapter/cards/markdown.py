"""Values as Markdown: cells, tables, paragraphs, lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


def table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], *, highlight: object = None
) -> str:
    """Return a table; the row whose first cell is ``highlight`` is bold."""
    lines = [_line(map(cell, columns)), "|" + "---|" * len(columns)]
    for row in rows:
        cells = [cell(value) for value in row]
        if highlight is not None and row and row[0] == highlight:
            cells = [f"**{text}**" if text else text for text in cells]
        lines.append(_line(cells))
    return "\n".join(lines)


def cell(value: object) -> str:
    """Return a value as the text of a table's cell."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(value).split()))


def paragraphs(value: object) -> list[str]:
    """Return one text, or a list of them, as a list; nothing for anything else."""
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def bullets(items: Iterable[str]) -> str:
    """Return a list."""
    return "\n".join(f"- {item}" for item in items)


def code(text: str, language: str) -> str:
    """Return a block of code."""
    return f"```{language}\n{text}\n```"


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {text} " if text else " " for text in cells) + "|"
