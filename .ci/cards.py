"""Writes weights_cards/ from the registry and the projections in the package.

python .ci/cards.py           writes the cards that changed
python .ci/cards.py --check   writes nothing; fails if any is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cosettle_adapter import ProjectionConfig
from cosettle_adapter.backbones import REGISTRY, BackboneRow
from cosettle_adapter.cards import card_text
from cosettle_adapter.hub import bundled_config

FOLDER = Path(__file__).parents[1] / "weights_cards"
COLUMNS = ("benchmark", "backbone alone", "with the authors' projection")
BENCHMARKS = ("DAVIS J&F", "VIP mIoU", "JHMDB PCK@0.1")
REPORTED = {  # by the paper for each benchmark: the backbone alone, then with its projection
    "mae": ((52.4, 59.6), (29.3, 33.8), (41.6, 48.4)),
    "ijepa": ((53.9, 58.7), (31.5, 35.3), (42.6, 44.4)),
    "clip": ((54.9, 58.3), (38.1, 39.2), (36.9, 40.6)),
    "blip": ((58.8, 62.0), (37.6, 39.6), (35.1, 38.9)),
    "mocov3": ((62.6, 62.9), (38.8, 39.8), (43.6, 45.3)),
    "ibot": ((64.6, 65.1), (39.6, 40.8), (45.7, 46.1)),
    "dino": ((63.2, 64.2), (39.1, 39.8), (44.4, 46.2)),
    "dinov2": ((63.1, 63.7), (38.4, 39.9), (46.6, 47.3)),
}
ABOUT = (
    "The projection was trained by the authors of the paper on Kinetics-400, without labels, with "
    "the backbone frozen. Their checkpoint, `ckpts/ours/{release}+ours` of "
    "[yafeng19/Co-Settle](https://huggingface.co/yafeng19/Co-Settle), holds backbone and "
    "projection together and is not part of this package: "
    '`CoSettleAdapter.from_pretrained("{name}")` finds it in the listing, converts it to '
    "safetensors once, and keeps that in the cache."
)


def released_config(row: BackboneRow, release: str) -> ProjectionConfig:
    """What is known of a released projection before it is downloaded."""
    reported = {
        "title": "Reported by the authors, not measured here",
        "columns": COLUMNS,
        "rows": [(name, *pair) for name, pair in zip(BENCHMARKS, REPORTED[release], strict=True)],
    }
    figures = {
        "about": [ABOUT.format(name=row.name, release=release)],
        "measured": [reported],
        "limits": ["The reported figures have not been reproduced here."],
    }
    return ProjectionConfig(
        backbone=row.name,
        fingerprint="recorded when the checkpoint is converted",
        layers=(row.depth - 1,),
        norm=row.final_norm,
        in_width=row.width,
        out_width=row.width,
        licence=row.licence,
        figures=figures,
    )


def weights_cards() -> dict[str, str]:
    """Every card: file name to text."""
    cards = {}
    for row in REGISTRY.values():
        config = bundled_config(row.name)
        if config is None and row.release is not None:
            config = released_config(row, row.release)
        if config is not None:
            cards[f"{row.name}.md"] = card_text(config, row, title=row.name, name=row.name)
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
