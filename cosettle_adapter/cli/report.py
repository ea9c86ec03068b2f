"""One HTML page with tables, films and facts that can be sent around as a single file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cosettle_adapter.files import atomic_path

_MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".gif": "image/gif",
    ".png": "image/png",
    ".webp": "image/webp",
}


@dataclass(frozen=True)
class ReportTable:
    """A table of the report.

    Attributes:
        title: heading.
        columns: header cells; the first column names the rows.
        rows: cells as text, as many as there are columns.
        note: a sentence below it.
        best: for each row, the columns to set in bold (by index).
        emphasis: row (by index) that the report is about.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Mapping[int, Sequence[int]] | None = None
    emphasis: int | None = None

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"got row {index} of table {self.title!r} with {len(row)} cells, expected "
                    f"{len(self.columns)}: one for each column."
                )


@dataclass(frozen=True)
class ReportFilm:
    """A film or picture of the report.

    Attributes:
        path: ``.mp4``, ``.gif``, ``.png`` or ``.webp``; its bytes go into the page.
        caption: a sentence below it.
        poster: picture shown until the film can play.
    """

    path: Path
    caption: str
    poster: Path | None = None


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    tables: Sequence[ReportTable],
    films: Sequence[ReportFilm],
    facts: Mapping[str, str],
) -> Path:
    """Write a page that needs no other file and no network.

    It follows the reader's light or dark setting, and is written completely or not at all. All
    text is escaped.

    Args:
        path: where to; missing folders are created.
        title: heading and window title.
        lead: the paragraph below the heading.
        tables: shown after the films.
        films: shown in order, embedded.
        facts: what was run with what, as name and value.

    Returns:
        The path written.

    Raises:
        ValueError: a film or poster of an unknown format.
        OSError: a film that cannot be read.
    """
    sections = [
        f"<header><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p></header>",
        *(_film(film) for film in films),
        *(_table(table) for table in tables),
        _facts(facts),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, sections)))
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _film(film: ReportFilm) -> str:
    source = _embedded(film.path)
    caption = escape(film.caption)
    if film.path.suffix.lower() != ".mp4":
        shown = f'<img src="{source}" alt="{caption}">'
        return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
    poster = f' poster="{_embedded(film.poster)}"' if film.poster else ""
    return (
        f'<figure><video src="{source}"{poster} aria-label="{caption}" autoplay loop muted '
        f'playsinline tabindex=0 title="click to pause or play" onclick="{_TOGGLE}" '
        f"onkeydown=\"if (event.key === ' ') {{ event.preventDefault(); {_TOGGLE} }}\"></video>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _embedded(path: Path) -> str:
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        raise ValueError(
            f"got {path.name!r}, which a report cannot show; use one of {', '.join(_MEDIA_TYPES)}."
        )
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _table(table: ReportTable) -> str:
    header = "".join(f"<th scope=col>{escape(column)}</th>" for column in table.columns)
    body = "\n".join(_row(table, index) for index in range(len(table.rows)))
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h2>{escape(table.title)}</h2><div class=scroll><table>"
        f"<thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table></div>{note}</section>"
    )


def _row(table: ReportTable, index: int) -> str:
    name, *cells = table.rows[index]
    best = (table.best or {}).get(index, ())
    marked = [
        f"<td class=best>{escape(cell)}</td>" if column in best else f"<td>{escape(cell)}</td>"
        for column, cell in enumerate(cells, start=1)
    ]
    opening = "<tr class=emphasis>" if index == table.emphasis else "<tr>"
    return f"{opening}<th scope=row>{escape(name)}</th>{''.join(marked)}</tr>"


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()
    )
    return f"<section><h2>What was run</h2><dl>{entries}</dl></section>"


# a player's controls would cover half of a film this flat
_TOGGLE = "this.paused ? this.play() : this.pause()"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --paper: #fbfbfa; --ink: #1c1d20; --quiet: #63666d; --line: #e2e2df; --tint: #f0f3f8;
  --accent: #1f5fbf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141518; --ink: #e7e8ea; --quiet: #9a9da5; --line: #2d2f35; --tint: #1d222b;
    --accent: #8db8ff;
  }
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
figure { margin: 2.25rem 0 0; }
video, figure img {
  display: block; width: 100%; height: auto; background: #121418; border-radius: 8px;
  border: 1px solid var(--line);
}
figcaption, .note { max-width: 46rem; margin: 0.6rem 0 0; color: var(--quiet); font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.55rem 0.9rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0.75rem; white-space: nowrap; }
thead th { color: var(--quiet); font-size: 0.82rem; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
.best { font-weight: 650; color: var(--accent); }
.emphasis { background: var(--tint); }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.5rem; margin: 0;
  font-size: 0.92rem;
}
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
"""
