"""Commands about models: what there is, and filling the cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from cosettle_adapter.cli.common import DEFAULT_MODEL, WIDE, console

if TYPE_CHECKING:
    from cosettle_adapter.published import ModelInfo


def list_models(
    *, backbones: bool = False, as_json: Annotated[bool, Parameter(name="--json")] = False
) -> None:
    """Show models and backbones.

    Args:
        backbones: every registered backbone, not only those with a published projection.
        as_json: print JSON instead of a table.
    """
    from cosettle_adapter import published

    output = console()
    everything = published.list_models()
    models = [model for model in everything if model.has_projection]
    if as_json:
        output.print_json(json.dumps([dataclasses.asdict(model) for model in everything]))
    elif backbones:
        output.print(_backbones(everything, wide=output.width >= WIDE))
        output.print(
            "Any other encoder: timm:<tag>, timm:<tag>@<pixels a cell>, open_clip:<arch>/<tag>"
        )
    else:
        output.print(_models(models))
        output.print(
            f"{len(everything) - len(models)} more backbones (cosettle-adapter list --backbones), "
            "and any of timm's and open_clip's: a projection is fitted on first use"
        )


def download(
    models: Sequence[str] = (DEFAULT_MODEL,),
    /,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> None:
    """Download and verify models' weights, so that they load without network afterwards.

    Args:
        models: registered names.
        cache_dir: cache in place of ``HF_HOME``.
        offline: only verify what is in the cache.
    """
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.backbones import HubOptions, load_backbone, lookup

    output = console()
    hub = HubOptions(cache_dir=cache_dir, local_files_only=offline)
    for name in models:
        with output.status(f"downloading {name}"):
            if lookup(name).release is None:
                backbone = load_backbone(name, options=hub)
            else:
                backbone = CoSettleAdapter.from_pretrained(
                    name, cache_dir=cache_dir, local_files_only=offline
                ).backbone
        output.print(f"{name}: {backbone.origin}")
        output.print(f"  fingerprint {backbone.fingerprint}, licence {backbone.row.licence}")


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


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
