from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "benchmarks"
ALL = ["adapter(", "fusion", "mp4", "many", "from_pre", "propagation", "F of", "settle", "fit"]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["masks"], ["F of"]),
        pytest.param([], ALL, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("real_backbone")
def test_rows_are_measured_at_small_sizes(
    only: list[str], expected: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "costs.json"
    command = [sys.executable, str(SCRIPTS / "costs.py"), *only, "--quick", "-o", str(output)]
    subprocess.run(command, check=True, cwd=tmp_path)
    figures = json.loads(output.read_text("utf-8"))["figures"]
    assert all(any(part in row["what"] for row in figures) for part in expected)
    for row in figures:
        assert row["unit"] != "x" or 0 < row["low"] <= row["median"] <= row["high"], row
