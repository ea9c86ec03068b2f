"""Upload a fitted projection to the Hugging Face Hub with a generated card, in one commit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "upload a projection to the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("projection", help="folder that fit wrote, or registered name")
    parser.add_argument("repository", help="owner/name on the Hub; created if there is none")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--card", type=Path, help="README.md to use in place of a generated one")
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace a card that was edited by hand"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Upload; the token is the stored one (`hf auth login`) or HF_TOKEN."""
    from cosettle_adapter.backbones import HubOptions
    from cosettle_adapter.backbones.released import BACKBONE_FILE
    from cosettle_adapter.hub import push
    from cosettle_adapter.projection import Projection
    from cosettle_adapter.published import find_projection

    folder = find_projection(options.projection, HubOptions()).folder
    backbone = folder / BACKBONE_FILE  # what `convert` writes where it is not public
    card = options.card.read_text(encoding="utf-8") if options.card else None
    pushed = push(
        Projection.load(folder),
        options.repository,
        private=options.private,
        commit_message=options.message,
        revision=options.revision,
        create_pr=options.create_pr,
        card=card,
        overwrite_card=options.overwrite_card,
        extra_files={BACKBONE_FILE: backbone} if backbone.is_file() else None,
    )
    if pushed.kept_card:
        console.print("the card was edited by hand and is kept; --overwrite-card replaces it")
    console.print(pushed.pull_request or pushed.url, markup=False, soft_wrap=True)
    revision = f", revision='{pushed.commit}'"
    console.print(
        f"load it with CoSettleAdapter.from_pretrained('{options.repository}'{revision})",
        markup=False,
        soft_wrap=True,
    )
    return 0
