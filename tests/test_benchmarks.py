from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import small_corpus

SCRIPTS = Path(__file__).parent / "benchmarks"
ALL = ["adapter(", "fusion", "mp4", "many", "from_pre", "propagation", "F of", "settle", "fit"]


@pytest.mark.slow
@pytest.mark.usefixtures("real_backbone")
def test_rows_are_measured_at_small_sizes(tmp_path: Path) -> None:
    output = tmp_path / "costs.json"
    command = [sys.executable, str(SCRIPTS / "costs.py"), "--quick", "-o", str(output)]
    subprocess.run(command, check=True, cwd=tmp_path)
    figures = json.loads(output.read_text("utf-8"))["figures"]
    assert all(any(part in row["what"] for row in figures) for part in ALL)
    for row in figures:
        assert row["unit"] != "x" or 0 < row["low"] <= row["median"] <= row["high"], row


def test_the_session_on_a_gpu_is_rehearsed_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu
    import gpu_page

    small_corpus(monkeypatch.setattr)
    rows = []
    for part in gpu.PARTS:
        gpu.measure(part, gpu.Session("cpu", quick=True), tmp_path / f"{part}.json")
        record = json.loads((tmp_path / f"{part}.json").read_text("utf-8"))
        assert "error" not in record
        rows += record["rows"]
    assert all(row["per_second"] > 0 for row in rows if not row["what"].startswith("profile"))
    encoder = next(row for row in rows if "eager, whole encoder" in row["what"])
    # 16 patches of 14 x 14 pixels and the class token, four layers of width 32
    tokens, width, layers = 17, 32, 4
    layer = 2 * 12 * tokens * width**2 + 4 * tokens**2 * width
    embedding = 2 * 16 * 3 * 14**2 * width
    assert encoder["flops"] == pytest.approx(layers * layer + embedding, rel=0.01)
    page = tmp_path / "page.md"
    page.write_text(f"before {gpu_page.BEGIN} old {gpu_page.END} after", encoding="utf-8")
    gpu_page.write_cards([tmp_path], page)
    assert "old" not in page.read_text("utf-8")
    assert page.read_text("utf-8").count("MFU") == sum(row["mfu"] is not None for row in rows)


def test_parts_of_the_session_that_fail_leave_their_logs(tmp_path: Path) -> None:
    folder = tmp_path / "bin"  # in place of the Python that measures
    folder.mkdir()
    (folder / "python3").write_text('#!/bin/sh\necho "$@"\n[ "$2" = good ]\n', encoding="utf-8")
    (folder / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}
    command = [str(SCRIPTS / "gpu.sh"), str(tmp_path / "results"), "", "bad", "good"]
    subprocess.run(command, env=environment, check=True)
    results = tmp_path / "results"
    summary = (results / "summary.txt").read_text("utf-8")
    assert "bad: status 1" in summary
    assert "good: status 0" in summary
    assert "gpu.py bad --device cuda" in (results / "bad.log").read_text("utf-8")
