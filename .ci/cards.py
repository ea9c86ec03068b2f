"""Writes weights_cards/ from the registry and the projections in the package.

python .ci/cards.py           writes the cards that changed
python .ci/cards.py --check   writes nothing; fails if any is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cosettle_adapter.backbones import REGISTRY
from cosettle_adapter.cards import weights_card
from cosettle_adapter.hub import bundled_config

FOLDER = Path(__file__).parents[1] / "weights_cards"


def weights_cards() -> dict[str, str]:
    """Every card: file name to text."""
    cards = {}
    for row in REGISTRY.values():
        config = bundled_config(row.name)
        if config is not None or row.release is not None:
            cards[f"{row.name}.md"] = weights_card(row, config)
    return cards


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any is stale")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder of the cards")
    options = parser.parse_args()
    cards = weights_cards()
    found = {
        path.name: path.read_text(encoding="utf-8")
        for path in options.output.glob("*.md")
        if not path.stem.isupper()  # studies, as FIT.md
    }
    stale = [name for name, text in cards.items() if found.get(name) != text]
    unknown = sorted(found.keys() - cards.keys())
    for name in stale:
        print(f"{'stale' if options.check else 'wrote'}: {name}")
        if not options.check:
            (options.output / name).write_text(cards[name], encoding="utf-8", newline="\n")
    for name in unknown:
        print(f"no such model, delete: {name}")
    if options.check and (stale or unknown):
        print("write them with: python .ci/cards.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
