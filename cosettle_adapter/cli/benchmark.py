"""Measure what this package costs beside its encoder, and beside plain ways to do the same.

Both sides run in turn, so that ratios mean something on a busy machine too; figures by themselves
want a quiet one. Every comparison first makes sure that both sides compute the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import (
    DEFAULT_MODEL,
    DTYPES,
    add_cache_arguments,
    add_weights_argument,
)

if TYPE_CHECKING:
    from rich.console import Console

    from cosettle_adapter.benchmark import Report, Row, Settings, Table

HELP = "measure speed and memory beside the bare encoder and plain implementations"

# spelled out, so that --help needs no torch; a test compares them with the modules
ABOUT = {
    "inference": "adapter(frames) beside the bare timm backbone on the same normalised batch",
    "stream": "extract from an mp4 to a feature file beside the bare backbone on frames in memory",
    "propagation": "label propagation at 480p beside the dense one of DINO's evaluation script",
    "masks": "J and F of masks beside a plain NumPy and SciPy version of the definition",
    "training": "a training step, decoding included, beside the official code's; and with cached "
    "views",
    "fit": "fit beside one encoder pass over the same frames",
    "settle": "settling a clip by its own statistics beside one encoder pass over its frames",
    "load": "from_pretrained from a warm cache beside timm; what the import adds",
    "size": "our own share of the time from 16 x 16 to 74 x 74 cells; propagation against context",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options: a sub-command each, all of them, and the page."""
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, about in {**ABOUT, "all": "all of these, one after the other"}.items():
        kind = kinds.add_parser(
            name,
            help=about,
            description=about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_run_arguments(kind)
    page = kinds.add_parser("page", help="reports as one page of Markdown")
    page.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="JSON of -o")
    page.add_argument("-o", "--output", type=Path, required=True, help="the page, FILE.md")
    page.add_argument(
        "--findings",
        type=Path,
        help="Markdown to end with, from '## Findings' on; what the page has already, by default",
    )
    page.add_argument(
        "--summary-in",
        type=Path,
        metavar="FILE.md",
        help="another page, such as README.md, whose marked place gets the summary",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="registered name, timm:<tag> or projection folder; a backbone without a projection "
        "gets the paper's head",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="download nothing: random numbers take the same time",
    )
    add_weights_argument(parser)
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone")
    parser.add_argument("--compile", action="store_true", help="torch.compile both encoders")
    parser.add_argument("--threads", type=int, help="of torch; as many as there are cores")
    parser.add_argument("--repeats", type=int, help="pairs of runs, in place of each one's own")
    parser.add_argument("--batch-size", type=int, help="frames or clips at a time")
    parser.add_argument("--size", type=int, help="shorter side of the frames, in pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode, training")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: whether it works, not how fast it is"
    )
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--folder", type=Path, help="for films and models, a few GB; /tmp or so")
    add_cache_arguments(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, or write the page."""
    if options.benchmark == "page":
        return _write_page(options, console)
    from cosettle_adapter import benchmark

    _check_output(options)
    if options.threads is not None:
        _set_threads(options.threads)
    report = benchmark.Report.begin(_settings(options), options.words)
    console.print(str(report.machine), markup=False, highlight=False, soft_wrap=True)
    names = benchmark.NAMES if options.benchmark == "all" else (options.benchmark,)
    for name in names:
        failed = _measure(name, report, options, console)
        if options.output is not None:
            report.write(options.output)
        if failed is not None and options.benchmark != "all":
            raise benchmark.BenchmarkError(failed)
    if options.quick:
        console.print("--quick: these figures say that it works, not how fast it is")
    for name, reason in report.failed.items():
        console.print(f"{name} was not measured: {reason}", style="red", markup=False)
    return 1 if report.failed else 0


def _measure(
    name: str, report: Report, options: argparse.Namespace, console: Console
) -> str | None:
    """Run one benchmark and print what it finds; return why it could not, if so."""
    from rich.markup import escape

    from cosettle_adapter import benchmark

    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with console.status(name) as status:

        def say(text: str) -> None:
            status.update(escape(text))

        found = list(benchmark.run([name], report, folder=options.folder, say=say))
    rows = [each for each in found if not isinstance(each, benchmark.Table)]
    if rows:
        _print_rows(name, rows, console)
    for each in found:
        if isinstance(each, benchmark.Table):
            _print_table(each, console)
    return report.failed.get(name)


def _print_rows(name: str, rows: list[Row], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table as Drawn

    from cosettle_adapter.benchmark.words import HEADERS, cells

    drawn = Drawn(title=name, title_justify="left", title_style="bold", show_lines=len(rows) > 1)
    for index, header in enumerate(HEADERS):
        drawn.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows:
        *words, met = cells(row.to_dict())
        style = {"yes": "green", "no": "red"}.get(met, "")
        drawn.add_row(*map(escape, words), f"[{style}]{met}[/]" if style else met)
    console.print(drawn)
    for remark in dict.fromkeys((row.beside, row.check, row.note) for row in rows):
        remarks = "; ".join(words for words in remark if words)
        console.print(f"beside {remarks}", markup=False, highlight=False)


def _print_table(table: Table, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table as Drawn

    drawn = Drawn(title=escape(table.title), title_justify="left", title_style="bold")
    for column in table.columns:
        drawn.add_column(escape(column), justify="right")
    for row in table.rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    console.print(drawn)
    if table.note:
        console.print(table.note, markup=False, highlight=False)


def _settings(options: argparse.Namespace) -> Settings:
    from cosettle_adapter.benchmark import Settings

    weights = options.backbone_weights
    return Settings(
        model=options.model,
        random_weights=options.random_weights,
        backbone_weights=None if weights is None else str(weights),
        device=options.device,
        dtype=options.dtype,
        compile=options.compile,
        repeats=options.repeats,
        batch_size=options.batch_size,
        size=options.size,
        workers=options.workers,
        quick=options.quick,
        offline=options.offline,
        cache_dir=options.cache_dir,
    )


def _check_output(options: argparse.Namespace) -> None:
    """Say so before measuring, not after."""
    output: Path | None = options.output
    if output is None:
        return
    if output.is_dir():
        raise IsADirectoryError(f"-o {output} is a folder; give a file, such as {output}/cpu.json")
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} is there already; give --overwrite to replace it")
    output.parent.mkdir(parents=True, exist_ok=True)


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _write_page(options: argparse.Namespace, console: Console) -> int:
    from cosettle_adapter.benchmark import (
        BenchmarkError,
        findings_of,
        page,
        put_summary,
        read_report,
        summary,
    )
    from cosettle_adapter.files import atomic_path

    if options.summary_in is not None and options.summary_in.resolve() == options.output.resolve():
        raise BenchmarkError(f"--summary-in {options.summary_in} is what -o writes already")
    reports = [read_report(path) for path in options.reports]
    findings = (
        findings_of(options.output)
        if options.findings is None
        else options.findings.read_text("utf-8")
    )
    pages = {options.output: page(reports, findings=findings)}
    if options.summary_in is not None:
        pages[options.summary_in] = put_summary(summary(reports), options.summary_in)
    for path, text in pages.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        console.print(f"wrote {path}", markup=False, highlight=False)
    return 0
