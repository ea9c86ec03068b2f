"""Parts of a page that needs no other file and no network; all text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.extras import require


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: heading.
        columns: header cells; the first column names the rows.
        rows: cells as text, as many as there are columns.
        note: a sentence below it.
        emphasis: row (by index) that the page is about.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    emphasis: int | None = None

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"got row {index} of table {self.title!r} with {len(row)} cells, expected "
                    f"{len(self.columns)}: one for each column"
                )


def page(title: str, lead: str, sections: Sequence[str], *, style: str = "") -> str:
    """Return a whole document.

    Args:
        title: heading and window title.
        lead: the paragraph below the heading.
        sections: HTML, each from one of the functions here; empty ones are left out.
        style: CSS after the page's own.
    """
    opening = f"<h1>{escape(title)}</h1>" + (f"<p class=lead>{escape(lead)}</p>" if lead else "")
    body = "\n".join([f"<header>{opening}</header>", *filter(None, sections)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a section, or nothing when it has no parts."""
    inside = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def paragraph(text: str) -> str:
    """Return a paragraph of explanation."""
    return f"<p class=note>{escape(text)}</p>" if text else ""


def figure(inside: str, caption: str) -> str:
    """Return a figure around HTML, with a caption as text."""
    return f"<figure>{inside}<figcaption>{escape(caption)}</figcaption></figure>"


def table(content: Table) -> str:
    """Return a table without its title."""
    header = "".join(f"<th scope=col>{escape(column)}</th>" for column in content.columns)
    rows = []
    for index, (name, *cells) in enumerate(content.rows):
        opening = "<tr class=emphasis>" if index == content.emphasis else "<tr>"
        inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"{opening}<th scope=row>{escape(name)}</th>{inside}</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{header}</tr></thead><tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody></table></div>{paragraph(content.note)}"
    )


def facts(entries: Mapping[str, str]) -> str:
    """Return names and values."""
    if not entries:
        return ""
    inside = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{inside}</dl>"


def picture(image: Tensor, alt: str) -> str:
    """Return an image as part of the page.

    Args:
        image: ``(3, H, W)`` uint8.
        alt: what it shows.

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
    height, width = image.shape[1:]
    pixels = rearrange(image.cpu(), "c h w -> h w c").contiguous()
    file = io.BytesIO()
    pillow.fromarray(pixels.numpy()).save(file, format="JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}">'
    )


_STYLE = """
:root {
  --paper: #fbfbfa; --ink: #1c1d20; --quiet: #63666d; --line: #e2e2df; --tint: #f0f3f8;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #141518; --ink: #e7e8ea; --quiet: #9a9da5; --line: #2d2f35; --tint: #1d222b; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.75rem; }
h2 { font-size: 1.15rem; letter-spacing: -0.01em; margin: 3rem 0 0.75rem; }
.lead { max-width: 46rem; margin: 0; color: var(--quiet); font-size: 1.05rem; }
.note, figcaption { max-width: 46rem; margin: 0.6rem 0 0; color: var(--quiet); font-size: 0.9rem; }
figure { margin: 1.5rem 0 0; min-width: 0; overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; }
.pair, .pictures { display: grid; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem; }
.pictures {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem;
}
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.25rem; margin: 0.75rem 0 0.25rem; }
.chip { font-size: 0.9rem; color: var(--quiet); }
.chip::before {
  content: ""; display: inline-block; width: 0.75em; height: 0.75em; border-radius: 50%;
  margin-right: 0.5em;
}
.scroll { overflow-x: auto; margin-top: 1rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.55rem 0.9rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0.75rem; white-space: nowrap; }
thead th { color: var(--quiet); font-size: 0.82rem; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
.emphasis { background: var(--tint); }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.5rem; margin: 0;
  font-size: 0.92rem;
}
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
"""
