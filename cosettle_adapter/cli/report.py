# shim: removed at integration
"""The demo's report under its old place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cosettle_adapter.evaluation.report import Figure, Section, film, write_page
from cosettle_adapter.evaluation.report import Table as ReportTable


class ReportFilm(Figure):
    """A film of the report."""

    def __init__(self, path: Path, caption: str, poster: Path | None = None) -> None:
        found = film(path, caption, poster)
        super().__init__(found.content, found.caption)


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    tables: Sequence[ReportTable],
    films: Sequence[ReportFilm],
    facts: Mapping[str, str],
) -> Path:
    """Write the demo's page; see :func:`~cosettle_adapter.evaluation.report.write_page`."""
    sections = [Section("", films), *(Section(table.title, [table]) for table in tables)]
    return write_page(path, title=title, lead=lead, sections=sections, facts=facts)
