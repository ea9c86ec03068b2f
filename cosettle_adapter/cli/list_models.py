"""Show what there is: models with a projection, or every registered backbone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
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
    from cosettle_adapter.cli import WIDE
    from cosettle_adapter.published import list_models

    everything = list_models()
    models = [model for model in everything if model.has_projection]
    if options.json:
        console.print_json(json.dumps([dataclasses.asdict(model) for model in everything]))
    elif options.backbones:
        console.print(_backbones(everything, wide=console.width >= WIDE))
        console.print(
            "Any other encoder: timm:<tag>, timm:<tag>@<pixels a cell>, open_clip:<arch>/<tag>"
        )
    else:
        console.print(_models(models))
        console.print(
            f"{len(everything) - len(models)} more backbones (cosettle-adapter list --backbones), "
            "and any of timm's and open_clip's: a projection is fitted on first use"
        )
    return 0


def _models(models: Sequence[ModelInfo]) -> Table:
    table = _table("Models with a published projection", ("name", "licence", "projection"))
    table.add_column("measured")
    for model in models:
        summary = str(model.figures.get("summary", ""))
        table.add_row(model.name, model.licence, model.projection, summary)
    return table


def _backbones(models: Sequence[ModelInfo], *, wide: bool) -> Table:
    columns: dict[str, Callable[[ModelInfo], str]] = {
        "name": lambda model: model.name,
        "family": lambda model: model.family,
        "positions": lambda model: model.positions,
        "patch": lambda model: str(model.patch),
        "width": lambda model: str(model.width),
        "image": lambda model: str(model.image_size),
        "licence": lambda model: model.licence.removeprefix("LicenseRef-"),
        "source": lambda model: model.source,
        "projection": lambda model: model.projection,
    }
    left_out = () if wide else ("family", "width", "image", "source")
    shown = {name: cell for name, cell in columns.items() if name not in left_out}
    title = "Backbones" if wide else f"Backbones (a wider terminal shows {', '.join(left_out)} too)"
    table = _table(title, tuple(shown))
    for model in models:
        table.add_row(*(cell(model) for cell in shown.values()))
    return table


def _table(title: str, whole: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in whole:
        table.add_column(column, no_wrap=True)
    return table
