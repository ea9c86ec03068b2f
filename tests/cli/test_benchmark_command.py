from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from cosettle_adapter.benchmark import NAMES, child
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.page import BEGIN, END
from cosettle_adapter.cli import benchmark, main

MODEL = "--model timm:test_vit.r160_in1k --random-weights --offline --quick"


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Answer for processes of their own, each of which would import torch; holds what was asked."""
    asked: list[tuple[str, str]] = []

    def call(module: str, function: str, **arguments: Any) -> Any:
        json.dumps(arguments)
        assert callable(getattr(importlib.import_module(module), function))
        asked.append((module.rpartition(".")[2], function))
        if function == "peak_of_a_frame":
            return {"above": 2**20 if arguments["side"] == "ours" else 2**22, "peak": 2**30}
        return 2**30

    monkeypatch.setattr(child, "call", call)
    monkeypatch.setattr("cosettle_adapter.benchmark.importing.added_in_a_child", lambda name: 0.01)
    return asked


def test_the_list_is_that_of_the_modules() -> None:
    assert tuple(benchmark.ABOUT) == NAMES
    for name, about in benchmark.ABOUT.items():
        module = importlib.import_module(f"cosettle_adapter.benchmark.{name}")
        assert (name, about) == (module.NAME, module.ABOUT)


# what rows are held to, in their order: what a change must not relax in passing
TARGETS: dict[str, list[tuple[str, float] | None]] = {
    "inference": [(">=", 0.97), None],  # 40 % of the peak is for bfloat16 on a GPU
    "stream": [(">=", 0.90), ("<=", 1.05)],
    "propagation": [(">=", 5), ("<=", 0.25)],
    "masks": [(">=", 5), (">=", 5), None, None],
    "training": [(">=", 2), (">=", 10)],
    "fit": [("<=", 1.15), ("<=", 1.15)],
    "settle": [("<=", 1.0), ("<=", 1.0)],
    "load": [("<=", 1.2), ("<=", 50), ("<=", 50)],
    "size": [("<=", 0.03), ("<=", 0.03), (">=", 0.98)],
}


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_and_says_what_it_found(
    name: str,
    tmp_path: Path,
    no_processes: list[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    output, folder = tmp_path / "found" / "report.json", tmp_path / "work"
    command = f"benchmark {name} {MODEL} -o {output} --folder {folder}"
    assert main(command.split()) == 0
    report = json.loads(output.read_text("utf-8"))
    assert (report["format"], report["version"]) == ("cosettle-benchmark", 1)
    assert report["command"] == command
    assert report["settings"]["random_weights"] is True
    assert report["machine"]["cores"] >= 1
    assert "torch" in report["machine"]["versions"]
    assert report["failed"] == {}
    for row, held in zip(report["rows"], TARGETS[name], strict=True):
        assert row["benchmark"] == name
        assert row["title"]
        assert row["what"]
        assert row["beside"]
        figure = row["figure"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert row["ours"]["count"] >= 1
        assert row["samples"] or row["details"]
        bound = row["target"]
        if held is None:
            assert bound is None
            assert row["met"] is None
        else:
            assert ((">=" if bound["at_least"] else "<="), bound["value"]) == held
            over = figure["value"] >= bound["value"]
            under = figure["value"] <= bound["value"]
            assert row["met"] == (over if bound["at_least"] else under)
    printed = capsys.readouterr().out
    assert "--quick: these figures say that it works" in printed
    assert report["rows"][0]["what"] in " ".join(printed.split()).replace(" │ ", " ")
    assert list(folder.iterdir()) == []
    own = {"stream": "peak_of_extraction", "propagation": "peak_of_a_frame"}
    assert {function for _, function in no_processes} == {own[name]} if name in own else True


def test_one_that_cannot_be_run_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cosettle_adapter.benchmark.NAMES", ("training", "masks"))
    output = tmp_path / "all.json"
    command = f"benchmark all --model timm:test_convnext --random-weights --quick -o {output}"
    assert main(command.split()) == 1
    report = json.loads(output.read_text("utf-8"))
    assert "perturbs absolute positions" in report["failed"]["training"]
    assert {row["benchmark"] for row in report["rows"]} == {"masks"}
    assert "training was not measured: the official code" in capsys.readouterr().out
    page = tmp_path / "page.md"
    findings = tmp_path / "findings.md"
    findings.write_text("## Findings\n\nIt is the decoder.\n", "utf-8")
    words = f"benchmark page {output} {output} -o {page} --findings {findings}"
    assert main(words.split()) == 0
    text = page.read_text("utf-8")
    assert text.startswith("# Benchmarks\n")
    assert text.count("\n## ") == 2  # one machine, and the findings
    assert text.count("| what | ours | beside it |") == 2
    assert "`training` was not measured" in text
    assert text.endswith("## Findings\n\nIt is the decoder.\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n", "utf-8")
    assert main(f"benchmark page {output} -o {page} --summary-in {readme}".split()) == 0
    assert page.read_text("utf-8").endswith("## Findings\n\nIt is the decoder.\n")
    table = readme.read_text("utf-8").removeprefix(f"{BEGIN}\n\n").removesuffix(f"\n{END}\n")
    assert table.startswith("| what | target | ")
    assert "J and F of masks" in table
    assert table in page.read_text("utf-8")
    assert main(f"benchmark page {output} -o {page} --summary-in {page}".split()) == 1
    assert "is what -o writes already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--device cuda:7", "there is no GPU here"),
        ("--repeats 0", "repeats must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1"),
        ("--model dinov2-vits15 --random-weights", "Did you mean"),
        ("-o {folder}", "is a folder; give a file"),
        ("-o {there}", "is there already; give --overwrite"),
    ],
)
def test_errors_come_before_any_measuring(
    words: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "300")
    there = tmp_path / "there.json"
    there.write_text("{}")
    words = words.format(folder=tmp_path, there=there)
    assert main(["benchmark", "inference", "--quick", *words.split()]) == 1
    assert said in capsys.readouterr().err
    assert there.read_text() == "{}"


def test_a_page_wants_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("none.json", None), ("other.json", "[1]"), ("broken.json", "{")):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        assert main(["benchmark", "page", str(path), "-o", str(tmp_path / "page.md")]) == 1
        assert "is no report of this version's" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "page.md").exists()


def test_random_weights_cannot_pass_for_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    command = "benchmark load --model dinov2-vits14-pypi --random-weights --quick"
    assert main(command.split()) == 1
    assert "load cannot be measured with --random-weights" in capsys.readouterr().err


def test_a_process_of_its_own_answers() -> None:
    assert child.call("statistics", "fmean", data=[1, 2, 3]) == 2
    assert child.peak_bytes() >= child.resident_bytes() > 0
    taken = child.call(
        "cosettle_adapter.benchmark.propagation",
        "peak_of_a_frame",
        side="ours",
        grid=[20, 20],
        context=3,
        channels=64,
        device="cpu",
    )
    # more than the affinity of 400 cells to those of a frame, and not the whole process
    assert 400 * 400 * 4 <= taken["above"] < taken["peak"]


def test_what_went_wrong_in_a_process_of_its_own_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(python))
    for end, said in (("exit 1", "of its own: out of luck"), ("kill -9 $$", "too little memory")):
        python.write_text(f"#!/bin/sh\necho out of luck >&2\n{end}\n")
        python.chmod(0o755)
        with pytest.raises(BenchmarkError, match=said):
            child.call("statistics", "fmean", data=[1])
