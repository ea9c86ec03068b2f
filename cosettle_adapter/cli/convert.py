"""Convert a checkpoint of the paper's own code into a projection folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import add_cache_arguments

if TYPE_CHECKING:
    from rich.console import Console

HELP = "convert a checkpoint of the official code"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("file", type=Path, help="checkpoint-*.pth of the official code")
    parser.add_argument(
        "--backbone", required=True, help="the backbone it was trained on, for example mae-vitb16"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    add_cache_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Convert, compare the backbone with the public one, and write the folder."""
    from cosettle_adapter.backbones import HubOptions, lookup
    from cosettle_adapter.conversion import convert_checkpoint, public_weights

    row = lookup(options.backbone)
    hub = HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline)
    with console.status(f"reading {options.file.name}"):
        conversion = convert_checkpoint(options.file, row)
    if row.hub is not None:
        with console.status(f"comparing with {row.hub.repo}"):
            conversion = conversion.compared_with(public_weights(row, hub))
    with console.status(f"writing {options.output}"):
        conversion.save(options.output)
    config = conversion.projection.config
    parameters = sum(parameter.numel() for parameter in conversion.projection.parameters())
    console.print(f"projection  {config.kind}, {parameters:,} parameters, for {config.backbone}")
    console.print(f"backbone    {conversion.verdict}", markup=False, soft_wrap=True)
    console.print(f"fingerprint {config.fingerprint}", soft_wrap=True)
    console.print(f"licence     {config.licence}")
    name = options.output if options.output.is_absolute() else f"./{options.output}"
    console.print(f"load it with CoSettleAdapter.from_pretrained('{name}')", markup=False)
    return 0
