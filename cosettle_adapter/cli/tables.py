"""Tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from cosettle_adapter.evaluation import report


def terminal_table(table: report.Table, *, compact: bool = False) -> Table:
    """Return a table for the terminal; ``compact`` saves width for many columns."""
    shown = Table(title=escape(table.title), title_justify="left", title_style="bold")
    if compact:
        shown.box, shown.padding, shown.show_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    for column in table.columns:
        left = column == table.columns[0] and (not compact or table.rule is not None)
        left = left or column == "features"
        shown.add_column(escape(column), justify="left" if left else "right", no_wrap=compact)
    for index, row in enumerate(table.rows):
        if index == table.rule:
            shown.add_section()
        best = table.best.get(index, ())
        cells = map(escape, row)
        shown.add_row(*(f"[bold green]{c}[/]" if i in best else c for i, c in enumerate(cells)))
    return shown
