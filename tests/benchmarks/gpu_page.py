"""Write the results of `gpu.sh` into BENCHMARKS.md, one column a card.

python tests/benchmarks/gpu_page.py RESULTS...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import PAGE, write_on_page

BEGIN, END = "<!-- cards -->", "<!-- end of cards -->"


def write_cards(folders: list[Path], page: Path = PAGE) -> None:
    """Write a table with a column a card into BENCHMARKS.md."""
    cards: dict[str, dict[str, str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            for line in record["rows"]:
                if not line["what"].startswith("profile"):
                    cards.setdefault(record["card"], {})[line["what"]] = _cell(line)
    names = list(dict.fromkeys(name for card in cards.values() for name in card))
    head = ["what", *cards] if cards else ["what", "no card was at hand"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join([name, *(card.get(name, "") for card in cards.values())]) + " |"
        for name in names
    ]
    write_on_page(BEGIN, END, "\n".join(lines), page)


def _cell(line: dict[str, Any]) -> str:
    parts = [f"{line['per_second']:.4g} {line['unit']}"]
    if line["low"]:
        parts[0] += f" ({line['low']:.4g} to {line['high']:.4g})"
    if line["of"] is not None:
        parts.append(f"{line['of']:.2f} x {line['against']}")
    if line["mfu"] is not None:
        parts.append(f"{100 * line['mfu']:.0f} % MFU, {line['flops'] / 1e9:.3g} GFLOP each")
    if line["peak_gib"] is not None:
        parts.append(f"{line['peak_gib']:.2g} GiB")
    return ", ".join(parts)


if __name__ == "__main__":
    write_cards([Path(folder) for folder in sys.argv[1:]])
