"""Commands about models: what there is, downloading, converting and uploading."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from cosettle_adapter.cli.common import DEFAULT_MODEL, WIDE, Output, console

if TYPE_CHECKING:
    from cosettle_adapter.hub import ModelInfo


def list_models(
    *, backbones: bool = False, as_json: Annotated[bool, Parameter(name="--json")] = False
) -> None:
    """Show models and backbones.

    Args:
        backbones: every registered backbone, not only those with a published projection.
        as_json: print JSON instead of a table.
    """
    from cosettle_adapter import hub

    output = console()
    everything = hub.list_models()
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


def convert(
    file: Path,
    /,
    *,
    backbone: str,
    output: Output,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> None:
    """Convert a checkpoint of the paper's own code into a projection folder.

    Args:
        file: checkpoint-*.pth of the official code.
        backbone: the backbone it was trained on, for example mae-vitb16.
        output: folder to write.
        cache_dir: cache in place of ``HF_HOME``.
        offline: never touch the network.
    """
    from cosettle_adapter.backbones import HubOptions, lookup
    from cosettle_adapter.convert import convert_checkpoint

    screen = console()
    hub = HubOptions(cache_dir=cache_dir, local_files_only=offline)
    with screen.status(f"reading {file.name}, comparing with the public weights"):
        conversion = convert_checkpoint(file, lookup(backbone), options=hub)
    with screen.status(f"writing {output}"):
        conversion.save(output)
    config = conversion.projection.config
    parameters = sum(parameter.numel() for parameter in conversion.projection.parameters())
    folder = output if output.is_absolute() else f"./{output}"
    for line in (
        f"projection  {config.kind}, {parameters:,} parameters, for {config.backbone}",
        f"backbone    {conversion.verdict}",
        f"fingerprint {config.fingerprint}",
        f"licence     {config.licence}",
        f"load it with CoSettleAdapter.from_pretrained('{folder}')",
    ):
        screen.print(line, markup=False, soft_wrap=True)


def push(
    projection: str,
    repository: str,
    /,
    *,
    private: bool = False,
    message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    card: Path | None = None,
    overwrite_card: bool = False,
) -> None:
    """Upload a projection to the Hugging Face Hub with a generated card, in one commit.

    The token is the stored one (hf auth login) or HF_TOKEN.

    Args:
        projection: folder that fit wrote, or registered name.
        repository: owner/name on the Hub; created if there is none.
        private: create a private repository.
        message: first line of the commit.
        revision: branch to commit to.
        create_pr: open a pull request instead.
        card: README.md to use in place of a generated one.
        overwrite_card: replace a card that was edited by hand.
    """
    from cosettle_adapter import upload
    from cosettle_adapter.backbones import HubOptions
    from cosettle_adapter.hub import find_projection
    from cosettle_adapter.projection import Projection

    found = find_projection(projection, HubOptions())
    backbone = found.backbone_weights  # what `convert` writes where it is not public
    pushed = upload.push(
        Projection.load(found.folder),
        repository,
        private=private,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        card=card.read_text(encoding="utf-8") if card else None,
        overwrite_card=overwrite_card,
        extra_files={backbone.name: backbone} if backbone else None,
    )
    output = console()
    if pushed.kept_card:
        output.print("the card was edited by hand and is kept; --overwrite-card replaces it")
    output.print(pushed.pull_request or pushed.url, markup=False, soft_wrap=True)
    pinned = f"'{repository}', revision='{pushed.commit}'"
    output.print(
        f"load it with CoSettleAdapter.from_pretrained({pinned})", markup=False, soft_wrap=True
    )


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
