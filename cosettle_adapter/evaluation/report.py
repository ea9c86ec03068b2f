"""One HTML page with tables, figures and films that can be sent around as a single file.

It needs no other file and no network, follows the reader's light or dark setting, and is written
whole or not at all. All text is escaped.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

_MEDIA_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
# a player's controls would cover half of a flat film
_TOGGLE = "this.paused ? this.play() : this.pause()"


@dataclass(frozen=True)
class Table:
    """A table of text, for a page or the terminal.

    The first column names the rows; ``note`` is shown below. By index: ``best`` has the columns to
    set in bold for each row, ``emphasis`` is the row that the table is about, and before ``rule``
    a line is drawn in the terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Mapping[int, Sequence[int]] = field(default_factory=dict)
    emphasis: int | None = None
    rule: int | None = None


class Figure(NamedTuple):
    """HTML that is inserted as it is, the text below it, and its share of the page's width."""

    content: str
    caption: str
    width: Literal["whole", "half", "third"] = "whole"


class Section(NamedTuple):
    """A section of a page, of tables, figures and notes (plain text); left out without any."""

    title: str
    parts: Sequence[Table | Figure | str]


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str = "",
    sections: Sequence[Section] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a page and return its path; missing folders are created.

    ``lead`` is the paragraph below the heading, ``facts`` what was run with what, by name.
    """
    jinja: Any = require("jinja2", extra="report", purpose="writing a report")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        title=title, lead=lead, sections=sections, facts=facts
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def film(path: Path, caption: str) -> Figure:
    """Return an ``.mp4``, ``.gif`` or ``.png`` file, whose bytes go into the page."""
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        known = ", ".join(_MEDIA_TYPES)
        raise ValueError(f"got {path.name!r}, which a report cannot show; use one of {known}")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source, words = f"data:{media_type};base64,{data}", escape(caption)
    if media_type != "video/mp4":
        return Figure(f'<img src="{source}" alt="{words}">', caption)
    return Figure(
        f'<video src="{source}" aria-label="{words}" autoplay loop muted playsinline '
        f'tabindex="0" title="click to pause or play" onclick="{_TOGGLE}" '
        f"onkeydown=\"if (event.key === ' ') {{ event.preventDefault(); {_TOGGLE} }}\"></video>",
        caption,
    )
