"""Reports of several machines as one page of Markdown, and its summary in other pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.run import FORMAT, VERSION
from cosettle_adapter.benchmark.words import HEADERS, bound, cells, measured, number

_INTRODUCTION = """\
# Benchmarks

Two sides run in turn in one process (memory and imports: in processes of their own). A cell gives
the median and, in brackets, the quartiles; the figure is a ratio of medians, with a 95 % bootstrap
interval over pairs of runs. Every comparison first makes sure that both sides compute the same.
The other sides are in `cosettle_adapter/benchmark/others/`, each with a word on what it stands for.
A row that misses its target keeps its figure.
"""

FINDINGS = "## Findings"
BEGIN, END = "<!-- benchmark summary -->", "<!-- end of benchmark summary -->"


def read_report(path: Path) -> dict[str, Any]:
    """Read a report that ``cosettle-adapter benchmark -o`` wrote.

    Raises:
        BenchmarkError: it is none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} is no report of this version's `cosettle-adapter benchmark ... -o FILE` "
            f"({type(error).__name__}: {error})"
        ) from error
    report: dict[str, Any] = content
    return report


def page(reports: Sequence[Mapping[str, Any]], *, findings: str = "") -> str:
    """Return a page of Markdown.

    Args:
        reports: as JSON has them; those of one machine and device go under one heading.
        findings: Markdown to end with, under the heading :data:`FINDINGS`: what profiling showed.
    """
    parts = [_INTRODUCTION, summary(reports)]
    by_machine: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        by_machine.setdefault(_heading(report["machine"]), []).append(report)
    for heading, together in by_machine.items():
        parts.append(f"## {heading}\n")
        for report in together:
            parts.extend(_section(report))
    if findings:
        parts.append(f"{FINDINGS}\n\n{findings.removeprefix(FINDINGS).strip()}\n")
    return "\n".join(parts)


def summary(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of every row that is held to a target, with a column for each machine.

    Of rows that share a title, such as one for each size, the one that does worst by its target.
    """
    machines = list(dict.fromkeys(_heading(report["machine"]) for report in reports))
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for report in reports:
        for row in report["rows"]:
            if row["target"] is not None:
                by_machine = found.setdefault(row["title"], {each: [] for each in machines})
                by_machine[_heading(report["machine"])].append(row)
    lines = []
    for title, by_machine in found.items():
        worst = [min(rows, key=_margin, default=None) for rows in by_machine.values()]
        target = next(bound(row) for row in worst if row is not None)
        lines.append((title, target, *map(_figure, worst)))
    return _table(("what", "target", *machines), lines)


def findings_of(page: Path) -> str:
    """Return the findings that a page ends with, nothing if there are none or no page."""
    text = page.read_text("utf-8") if page.exists() else ""
    _, heading, findings = text.partition(f"\n{FINDINGS}\n")
    return heading.lstrip() + findings


def put_summary(text: str, page: Path) -> str:
    """Return the text of a page of Markdown with ``text`` between the marks for it.

    Raises:
        BenchmarkError: the page has no such marks, or several.
    """
    content = page.read_text("utf-8")
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    changed, places = between.subn(lambda _: f"\n{text}\n", content)
    if places != 1:
        raise BenchmarkError(
            f"{page} has {places} places for a summary, expected one: a line {BEGIN} and, below "
            f"it, a line {END}"
        )
    return changed


def _margin(row: Mapping[str, Any]) -> float:
    value, target = row["figure"]["value"], row["target"]
    margin: float = value - target["value"]
    return margin if target["at_least"] else -margin


def _figure(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return measured(row) if row["met"] else f"{measured(row)} (missed)"


def _heading(machine: Mapping[str, Any]) -> str:
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    return f"{machine['gpu']} ({cpu})" if machine["gpu"] else cpu


def _section(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load"]
    busy = "" if load is None else f", load {number(load)} at the start"
    yield (
        f"`cosettle-adapter {report['command']}`, {report['began'][:10]}, "
        f"{machine['threads']} threads, {versions}{busy}\n"
    )
    if report["rows"]:
        yield _table(HEADERS, [cells(row) for row in report["rows"]])
        yield "\n".join(_remarks(report["rows"])) + "\n"
    for table in report["tables"]:
        yield f"**{table['title']}**\n"
        yield _table(table["columns"], table["rows"])
        if table["note"]:
            yield table["note"] + "\n"
    for name, reason in report["failed"].items():
        yield f"`{name}` was not measured: {reason}\n"


def _remarks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    remarks = []
    for row in rows:
        words = [f"beside {row['beside']}", row["check"], row["note"]]
        remarks.append(f"- {row['title']}: {'; '.join(each for each in words if each)}")
    yield from dict.fromkeys(remarks)


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
