"""Tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from cosettle_adapter.evaluation import report


def terminal_table(table: report.Table, *, compact: bool = False) -> Table:
    """Return a table for the terminal; ``compact`` ones fit many columns into its width."""
    shown = Table(title=escape(table.title), title_justify="left", title_style="bold")
    if compact:
        shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        shown.padding, shown.show_edge = (0, 1, 0, 0), False
    for column in table.columns:
        left = column == "features" or (column == table.columns[0] and table.rule is not None)
        left = left or (not compact and column == table.columns[0])
        shown.add_column(escape(column), justify="left" if left else "right", no_wrap=compact)
    for index, row in enumerate(table.rows):
        if index == table.rule:
            shown.add_section()
        best = table.best.get(index, ())
        cells = [
            f"[bold green]{escape(cell)}[/]" if position in best else escape(cell)
            for position, cell in enumerate(row)
        ]
        shown.add_row(*cells)
    return shown
