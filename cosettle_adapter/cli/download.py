"""Fill the cache with a model's weights, so that it loads without network afterwards."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import DEFAULT_MODEL, add_cache_arguments

if TYPE_CHECKING:
    from rich.console import Console

HELP = "fetch and verify a model's weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("models", nargs="*", default=[DEFAULT_MODEL], help="registered names")
    add_cache_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Fetch each model's backbone, with the authors' projection where there is one."""
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.backbones import HubOptions, load_backbone, lookup

    hub = HubOptions(cache_dir=options.cache_dir, local_files_only=options.offline)
    for name in options.models:
        with console.status(f"fetching {name}"):
            if lookup(name).release is None:
                backbone = load_backbone(name, options=hub)
            else:
                backbone = CoSettleAdapter.from_pretrained(
                    name, cache_dir=options.cache_dir, local_files_only=options.offline
                ).backbone
        console.print(f"{name}: {backbone.origin}")
        console.print(f"  fingerprint {backbone.fingerprint}, licence {backbone.row.licence}")
    return 0
