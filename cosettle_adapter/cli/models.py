"""The commands ``list``, ``download``, ``convert`` and ``push``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from cosettle_adapter.cli.common import DEFAULT_MODEL, WIDE, Output, console


def list_models(
    *, backbones: bool = False, as_json: Annotated[bool, Parameter(name="--json")] = False
) -> None:
    """List models and backbones.

    Args:
        backbones: list all registered backbones, with or without a published projection.
        as_json: print JSON instead of a table.
    """
    from cosettle_adapter import hub

    output = console()
    models = hub.list_models()
    if as_json:
        output.print_json(json.dumps([dataclasses.asdict(model) for model in models]))
        return
    columns = ["name", "licence", "projection"]
    if backbones:
        wide = "name family positions patch width image_size licence source projection"
        narrow = "name positions patch licence projection"
        columns = (wide if output.width >= WIDE else narrow).split()
    table = Table(*columns, *([] if backbones else ["measured"]))
    for model in models:
        cells = [str(getattr(model, name)).removeprefix("LicenseRef-") for name in columns]
        if backbones:
            table.add_row(*cells)
        elif model.has_projection:
            table.add_row(*cells, str(model.figures.get("summary", "")))
    output.print(table)
    more = "Any other encoder: timm:<tag>, timm:<tag>@<pixels a patch>, open_clip:<arch>/<tag>"
    if not backbones:
        more = (
            f"{len(models) - table.row_count} more backbones (cosettle-adapter list --backbones), "
            "and all of timm's and open_clip's; their projections are fitted on first use"
        )
    output.print(more)


def download(
    models: Sequence[str] = (DEFAULT_MODEL,),
    /,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> None:
    """Download and verify model weights; afterwards they load without a network.

    Args:
        models: registered names.
        cache_dir: cache folder in place of ``HF_HOME``.
        offline: verify the cached files without accessing the network.
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
    """Convert a checkpoint of the official code into a projection folder.

    Args:
        file: checkpoint-*.pth of the official code.
        backbone: registered name of its backbone, for example mae-vitb16.
        output: folder to write.
        cache_dir: cache folder in place of ``HF_HOME``.
        offline: never access the network.
    """
    from cosettle_adapter.backbones import HubOptions, lookup
    from cosettle_adapter.convert import convert_checkpoint

    screen = console()
    hub = HubOptions(cache_dir=cache_dir, local_files_only=offline)
    with screen.status(f"converting {file.name}, comparing with the public weights"):
        conversion = convert_checkpoint(file, lookup(backbone), options=hub)
        conversion.save(output)
    config = conversion.projection.config
    folder = output if output.is_absolute() else f"./{output}"
    for line in (
        f"projection  {config.kind}, for {config.backbone}",
        f"backbone    {conversion.verdict}",
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

    The access token is HF_TOKEN or the one that hf auth login stored.

    Args:
        projection: folder of a projection (as fit, train or convert write it) or registered name.
        repository: owner/name on the Hub; created if it does not exist.
        private: make a new repository private.
        message: first line of the commit message.
        revision: branch to commit to.
        create_pr: open a pull request instead of committing to the branch.
        card: README.md to upload in place of the generated card.
        overwrite_card: replace a card on the Hub that was edited by hand.
    """
    from cosettle_adapter import upload
    from cosettle_adapter.backbones import HubOptions
    from cosettle_adapter.hub import find_projection, stored_backbone
    from cosettle_adapter.projection import Projection

    folder = find_projection(projection, HubOptions())
    backbone = stored_backbone(folder)  # `convert` stores a backbone that is not public
    pushed = upload.push(
        Projection.load(folder),
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
    pinned = f"CoSettleAdapter.from_pretrained('{repository}', revision='{pushed.commit}')"
    output.print(f"load it with {pinned}", markup=False, soft_wrap=True)
