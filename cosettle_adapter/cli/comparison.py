"""Figures of several kinds of features as one table, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Literal

from cosettle_adapter.cli.report import ReportTable

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """Which figure a column shows, summed up how over clips, written how.

    Attributes:
        title: header.
        figure: name of the figure.
        over_clips: the mean over clips, or the worst of them.
        form: format string of a cell.
        better: which way is better; ``None`` where neither is good in itself.
        meaning: sentence for the table's note.
    """

    title: str
    figure: str
    over_clips: Literal["mean", "worst"]
    form: str
    better: Literal["lower", "higher"] | None = None
    meaning: str = ""

    def summary(self, clips: Sequence[Mapping[str, float]]) -> float:
        """Sum the figure up over clips."""
        values = [clip[self.figure] for clip in clips]
        if self.over_clips == "mean":
            return mean(values)
        return max(values) if self.better == "lower" else min(values)


COLUMNS = (
    Column(
        "tracking error",
        "mean",
        "mean",
        "{:.1f} px",
        better="lower",
        meaning="Tracking: how far the nearest neighbour of a point of the first frame lies from "
        "where that point truly is, over all later frames in which it is visible; mean over "
        "points, frames and clips.",
    ),
    Column("on the worst clip", "mean", "worst", "{:.1f} px", better="lower"),
    Column("within 8 px", "pck@8", "mean", "{:.1%}", better="higher"),
    Column(
        "cycle accuracy",
        "cycle",
        "mean",
        "{:.1%}",
        better="higher",
        meaning="Cycle accuracy: cells that come back to themselves by nearest neighbours in the "
        "next frame and back.",
    ),
    Column(
        "drift",
        "drift@1",
        "mean",
        "{:.1%}",
        better="lower",
        meaning="Drift: cosine distance of patches that show the same thing one, four and eight "
        "frames apart, over that of any two patches; by the true motion, or by matches of a layer "
        "that the projection does not read.",
    ),
    *(
        Column(f"{gap} frames on", f"drift@{gap}", "mean", "{:.1%}", better="lower")
        for gap in (4, 8)
    ),
)


def comparison(
    title: str, figures: Mapping[str, Sequence[Mapping[str, float]]], *, emphasis: str = ""
) -> ReportTable:
    """Tabulate what was measured.

    Args:
        title: heading.
        figures: kind of features to the figures of each clip, by the ``figure`` of
            :data:`COLUMNS`; columns whose figure was not measured are left out.
        emphasis: the kind that the table is about.

    Returns:
        A row a kind, the best of each column marked, with what the columns mean below.
    """
    measured = set.intersection(*(set(clip) for clips in figures.values() for clip in clips))
    columns = [column for column in COLUMNS if column.figure in measured]
    cells: dict[str, list[str]] = {name: [] for name in figures}
    best: dict[int, list[int]] = {row: [] for row in range(len(figures))}
    for position, column in enumerate(columns, start=1):
        values = [column.summary(clips) for clips in figures.values()]
        written = [column.form.format(value) for value in values]
        winner = min(values) if column.better == "lower" else max(values)
        for row, (name, cell) in enumerate(zip(figures, written, strict=True)):
            cells[name].append(cell)
            if column.better and cell == column.form.format(winner):  # reads the same: as good
                best[row].append(position)
    names = list(figures)
    return ReportTable(
        title=title,
        columns=["features", *(column.title for column in columns)],
        rows=[[name, *cells[name]] for name in names],
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
