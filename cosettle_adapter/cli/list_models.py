"""Show every registered model: backbone, patch, width, licence, projection, figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "show the registered models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the models."""
    from rich.table import Table

    from cosettle_adapter.published import list_models

    models = list_models()
    if options.json:
        console.print_json(json.dumps([dataclasses.asdict(model) for model in models]))
        return 0
    table = Table(title="Registered models", title_justify="left")
    for column in ("name", "licence", "projection"):
        table.add_column(column, no_wrap=True)
    for column in ("patch", "width"):
        table.add_column(column, justify="right")
    table.add_column("measured")
    for model in models:
        table.add_row(
            model.name,
            model.licence,
            model.projection,
            str(model.patch),
            str(model.width),
            str(model.figures.get("summary", "")),
        )
    console.print(table)
    console.print("For a backbone without a projection, fit one: cosettle-adapter fit --help")
    return 0
