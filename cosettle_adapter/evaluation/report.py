"""One HTML page with tables, figures and films that can be sent around as a single file.

It needs no other file and no network, follows the reader's light or dark setting, and is written
whole or not at all. All text is escaped.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

_MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".gif": "image/gif",
    ".png": "image/png",
    ".webp": "image/webp",
}
# a player's controls would cover half of a flat film
_TOGGLE = "this.paused ? this.play() : this.pause()"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading.
        columns: header cells; the first column names the rows.
        rows: cells as text, as many as there are columns.
        note: a sentence below it.
        best: for each row, the columns to set in bold (by index).
        emphasis: row (by index) that the table is about.
        rule: row (by index) before which a line is drawn in the terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Mapping[int, Sequence[int]] = field(default_factory=dict)
    emphasis: int | None = None
    rule: int | None = None

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"got row {index} of table {self.title!r} with {len(row)} cells, expected "
                    f"{len(self.columns)}: one for each column"
                )


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        content: HTML, inserted as it is: see :func:`film`, :func:`picture` and ``figures``.
        caption: text below it.
        width: how much of the page's width it takes.
    """

    content: str
    caption: str
    width: Literal["whole", "half", "third"] = "whole"


@dataclass(frozen=True)
class Section:
    """A section of a page; without parts it is left out.

    Attributes:
        title: heading, if any.
        parts: tables, figures and, as plain text, notes.
    """

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
    """Write a page.

    Args:
        path: where to; missing folders are created.
        title: heading and window title.
        lead: the paragraph below the heading.
        sections: shown in order.
        facts: what was run with what, as name and value.

    Returns:
        The path written.

    Raises:
        MissingExtraError: jinja2 is not installed.
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


def film(path: Path, caption: str, poster: Path | None = None) -> Figure:
    """Return a film or picture from a file, whose bytes go into the page.

    Args:
        path: ``.mp4``, ``.gif``, ``.png`` or ``.webp``.
        caption: a sentence below it.
        poster: picture shown until the film can play.

    Raises:
        ValueError: an unknown format.
        OSError: a file that cannot be read.
    """
    source, words = _embedded(path), escape(caption)
    if path.suffix.lower() != ".mp4":
        return Figure(f'<img src="{source}" alt="{words}">', caption)
    shown = f' poster="{_embedded(poster)}"' if poster else ""
    return Figure(
        f'<video src="{source}"{shown} aria-label="{words}" autoplay loop muted playsinline '
        f'tabindex="0" title="click to pause or play" onclick="{_TOGGLE}" '
        f"onkeydown=\"if (event.key === ' ') {{ event.preventDefault(); {_TOGGLE} }}\"></video>",
        caption,
    )


def picture(
    image: Tensor, caption: str, width: Literal["whole", "half", "third"] = "third"
) -> Figure:
    """Return an image ``(3, H, W)`` uint8 as a figure.

    Raises:
        FrameError: another shape or dtype.
        MissingExtraError: Pillow is not installed.
    """
    if image.ndim != 3 or len(image) != 3 or str(image.dtype) != "torch.uint8":
        raise FrameError(
            f"got a picture of shape {tuple(image.shape)} and dtype {image.dtype}, expected "
            "(3, H, W) uint8"
        )
    pillow: Any = require("PIL.Image", extra="eval", purpose="showing pictures in a report")
    file = io.BytesIO()
    pixels = rearrange(image.cpu(), "c h w -> h w c").contiguous()
    pillow.fromarray(pixels.numpy()).save(file, format="JPEG", quality=88)
    source = _data_url("image/jpeg", file.getvalue())
    return Figure(f'<img src="{source}" alt="{escape(caption)}">', caption, width)


def _embedded(path: Path) -> str:
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        raise ValueError(
            f"got {path.name!r}, which a report cannot show; use one of {', '.join(_MEDIA_TYPES)}"
        )
    return _data_url(media_type, path.read_bytes())


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
