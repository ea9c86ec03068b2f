from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cosettle_adapter.benchmark import BenchmarkError, findings_of, page, put_summary, summary
from cosettle_adapter.benchmark.page import BEGIN, END
from cosettle_adapter.benchmark.row import Target, value

ROOT = Path(__file__).parents[2]


def report(figures: list[tuple[str, float, Target | None]], *, gpu: str = "") -> dict[str, Any]:
    rows = [
        value(
            [figure], unit="x", form="{:.2f} x", benchmark="b", title=title, what="w", beside="o",
            target=target,
        ).to_dict()
        for title, figure, target in figures
    ]  # fmt: skip
    machine = {"cpu": "a CPU", "cores": 2, "gpu": gpu, "threads": 2, "versions": {}, "load": None}
    return {
        "machine": machine, "rows": rows, "tables": [], "failed": {}, "command": "benchmark b",
        "began": "2026-01-01",
    }  # fmt: skip


def test_the_summary_has_the_worst_of_each_title_on_each_machine() -> None:
    fast, small = Target(2, at_least=True), Target(0.5, at_least=False)
    text = summary(
        [
            report([("speed", 2.5, fast), ("speed", 2.25, fast), ("no target", 9, None)]),
            report([("memory", 0.25, small), ("memory", 0.75, small)]),
            report([("speed", 1.5, fast)], gpu="a GPU"),
        ]
    )
    assert text.splitlines() == [
        "| what | target | a CPU, 2 cores | a GPU (a CPU, 2 cores) |",
        "| --- | --- | --- | --- |",
        "| speed | ≥ 2.00 x | 2.25 x | 1.50 x (missed) |",
        "| memory | ≤ 0.50 x | 0.75 x (missed) |  |",
    ]


def test_the_summary_is_put_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n\nold | \\1\n\n{END}\nafter\n", "utf-8")
    for table in ("| new \\1 |\n", "| newer |\n"):  # a second time, too
        text = put_summary(table, readme)
        assert text == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"
        readme.write_text(text, "utf-8")


@pytest.mark.parametrize("text", ["no marks", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2])
def test_a_page_without_one_place_for_it_is_an_error(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, "utf-8")
    with pytest.raises(BenchmarkError, match="places for a summary, expected one"):
        put_summary("table", readme)
    assert readme.read_text("utf-8") == text


def test_findings_are_those_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    assert findings_of(path) == ""
    for given in ("## Findings\n\nA decoder.\n", "A decoder."):
        path.write_text(page([report([])], findings=given), "utf-8")
        assert findings_of(path) == "## Findings\n\nA decoder.\n"
    path.write_text(page([report([])]), "utf-8")
    assert findings_of(path) == ""


def test_the_readme_shows_the_summary_of_the_benchmarks() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown.startswith("| what | target |")
    assert shown in (ROOT / "weights_cards" / "BENCHMARKS.md").read_text("utf-8")
