"""Figures of several kinds of features as one table, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosettle_adapter.cli.report import ReportTable

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """Which figure, a share in [0, 1], a column shows.

    Attributes:
        title: header.
        figure: name of the figure.
        better: whether the lowest or the highest is best.
        meaning: sentence for the table's note.
    """

    title: str
    figure: str
    better: str
    meaning: str = ""


COLUMNS = (
    Column(
        "drift, next frame",
        "drift@1",
        "lower",
        "Drift: cosine distance of patches that show the same thing, over that of any two patches; "
        "by the true motion, or by matches of a layer that the projection does not read.",
    ),
    Column("4 frames on", "drift@4", "lower"),
    Column("8 frames on", "drift@8", "lower"),
    Column(
        "right matches, next frame",
        "matches@1",
        "higher",
        "Right matches: patches whose nearest neighbour in the other frame lies within one patch "
        "of the truth.",
    ),
    Column("4 frames on", "matches@4", "higher"),
    Column("8 frames on", "matches@8", "higher"),
)


def comparison(
    title: str, figures: Mapping[str, Mapping[str, float]], *, emphasis: str = ""
) -> ReportTable:
    """Tabulate what was measured.

    Args:
        title: heading.
        figures: kind of features to its figures, by the ``figure`` of :data:`COLUMNS`; columns
            whose figure was not measured are left out.
        emphasis: the kind that the table is about.

    Returns:
        A row a kind, the best of each column marked, with what the columns mean below.
    """
    columns = [
        column for column in COLUMNS if all(column.figure in row for row in figures.values())
    ]
    cells = [[f"{row[column.figure]:.1%}" for column in columns] for row in figures.values()]
    best: dict[int, list[int]] = {row: [] for row in range(len(cells))}
    for position, column in enumerate(columns):
        values = [row[column.figure] for row in figures.values()]
        winner = f"{min(values) if column.better == 'lower' else max(values):.1%}"
        for row, written in enumerate(cells):
            if written[position] == winner:  # reads the same: as good
                best[row].append(position + 1)
    names = list(figures)
    return ReportTable(
        title=title,
        columns=["features", *(column.title for column in columns)],
        rows=[[name, *row] for name, row in zip(names, cells, strict=True)],
        note=" ".join(column.meaning for column in columns if column.meaning),
        best=best,
        emphasis=names.index(emphasis) if emphasis in names else None,
    )


def terminal_table(table: ReportTable) -> Table:
    """Return the table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(table.title), title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="right" if index else "left")
    for index, row in enumerate(table.rows):
        best = (table.best or {}).get(index, ())
        cells = [
            f"[bold green]{escape(cell)}[/]" if position in best else escape(cell)
            for position, cell in enumerate(row)
        ]
        shown.add_row(*cells)
    return shown
