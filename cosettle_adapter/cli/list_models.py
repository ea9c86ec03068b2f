"""Show what there is: models with a projection, or every registered backbone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cosettle_adapter.published import ModelInfo

HELP = "show models and backbones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--backbones", action="store_true", help="every registered backbone, not only models"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the models or the backbones."""
    from cosettle_adapter.published import list_models

    everything = list_models()
    models = [model for model in everything if model.has_projection]
    if options.json:
        console.print_json(json.dumps([dataclasses.asdict(model) for model in everything]))
    elif options.backbones:
        console.print(_backbones(everything))
        console.print(
            "Any other encoder: timm:<tag>, timm:<tag>@<pixels a cell>, open_clip:<arch>/<tag>"
        )
    else:
        console.print(_models(models))
        console.print(
            f"{len(everything) - len(models)} more backbones have no projection yet "
            "(cosettle-adapter list --backbones); fit one: cosettle-adapter fit --help"
        )
    return 0


def _models(models: Sequence[ModelInfo]) -> Table:
    table = _table("Models with a projection", ("name", "licence", "projection"))
    table.add_column("measured")
    for model in models:
        summary = str(model.figures.get("summary", ""))
        table.add_row(model.name, model.licence, model.projection, summary)
    return table


def _backbones(models: Sequence[ModelInfo]) -> Table:
    table = _table("Backbones", ("name",))
    for column in ("family", "positions"):
        table.add_column(column)
    for column in ("patch", "width", "image"):
        table.add_column(column, justify="right")
    for column in ("licence", "source", "projection"):
        table.add_column(column, overflow="fold")
    for model in models:
        table.add_row(
            model.name,
            model.family,
            model.positions,
            str(model.patch),
            str(model.width),
            str(model.image_size),
            model.licence,
            model.source,
            model.projection.replace("none published", "none"),
        )
    return table


def _table(title: str, whole: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in whole:
        table.add_column(column, no_wrap=True)
    return table
