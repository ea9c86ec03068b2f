"""Reports of several machines as one page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.run import FORMAT, VERSION
from cosettle_adapter.benchmark.words import HEADERS, cells, number

_INTRODUCTION = """\
# Benchmarks

Two sides run in turn in one process (memory and imports: in processes of their own). A cell gives
the median and, in brackets, the quartiles; the figure is a ratio of medians, with a 95 % bootstrap
interval over pairs of runs. Every comparison first makes sure that both sides compute the same.
The other sides are in `cosettle_adapter/benchmark/others/`, each with a word on what it stands for.
A row that misses its target keeps its figure.
"""


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
        findings: Markdown to end with: what profiling showed.
    """
    parts = [_INTRODUCTION]
    by_machine: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        by_machine.setdefault(_heading(report["machine"]), []).append(report)
    for heading, together in by_machine.items():
        parts.append(f"## {heading}\n")
        for report in together:
            parts.extend(_section(report))
    if findings:
        parts.append(findings.strip() + "\n")
    return "\n".join(parts)


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
    for row in rows:
        remarks = [f"beside {row['beside']}", row["check"], row["note"]]
        yield f"- {row['what']}: {'; '.join(remark for remark in remarks if remark)}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
