from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "benchmarks"


@pytest.mark.usefixtures("real_backbone")
def test_every_row_is_measured_at_small_sizes(tmp_path: Path) -> None:
    output = tmp_path / "costs.json"
    subprocess.run(
        [sys.executable, str(SCRIPTS / "costs.py"), "--quick", "-o", str(output)],
        check=True,
        cwd=tmp_path,
    )
    figures = json.loads(output.read_text("utf-8"))["figures"]
    whats = " ".join(row["what"] for row in figures)
    for part in (
        "adapter(frames)",
        "fusion",
        "mp4",
        "from_pretrained",
        "propagation",
        "F of",
        "fit",
    ):
        assert part in whats
    assert all(
        0 < row["low"] <= row["median"] <= row["high"] for row in figures if row["unit"] == "x"
    )
