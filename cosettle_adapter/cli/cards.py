"""Write the cards of ``weights_cards/`` from the registry and the projections in the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "write or check the cards of the published projections"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any is stale")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("weights_cards"), help="folder of the cards"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Write the cards, or compare them with what would be written."""
    from cosettle_adapter.cards import weights_cards
    from cosettle_adapter.files import atomic_path

    cards = weights_cards()
    folder: Path = options.output
    stale = [name for name, text in cards.items() if _text(folder / name) != text]
    pages = [path for path in folder.glob("*.md") if not path.stem.isupper()]  # studies are
    unknown = sorted(path.name for path in pages if path.name not in cards)
    for name in [] if options.check else stale:
        with atomic_path(folder / name) as path:
            path.write_text(cards[name], encoding="utf-8", newline="\n")
    verb = "stale" if options.check else "wrote"
    for name in stale:
        console.print(f"{verb}: {folder / name}", markup=False, highlight=False)
    for name in unknown:
        console.print(f"no such model, delete: {folder / name}", markup=False, highlight=False)
    if options.check and (stale or unknown):
        console.print("write them with: cosettle-adapter cards", markup=False)
        return 1
    console.print(f"{len(cards)} cards are up to date", markup=False)
    return 0


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
