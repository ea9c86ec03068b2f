"""Running benchmarks one after the other, and writing down what they find."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.benchmark.bench import Bench, Settings
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.machine import Machine, describe
from cosettle_adapter.benchmark.row import Row, Table
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.evaluation.plain_json import write_json

NAMES = ("inference", "stream", "propagation", "masks", "training", "fit", "settle", "load", "size")

FORMAT, VERSION = "cosettle-benchmark", 1


@dataclasses.dataclass
class Report:
    """What a run found, as far as it is.

    Attributes:
        settings: of the run.
        machine: that it ran on.
        began: date and time, UTC.
        command: words of the command line.
        rows: comparisons.
        tables: further figures.
        failed: benchmarks that could not be run, and why.
    """

    settings: Settings
    machine: Machine
    began: str
    command: Sequence[str] = ()
    rows: list[Row] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, settings: Settings, command: Sequence[str] = ()) -> Report:
        """Describe the machine and the time."""
        now = datetime.datetime.now(datetime.timezone.utc)
        machine = describe(torch.device(settings.device))
        return cls(settings, machine, now.isoformat(timespec="seconds"), tuple(command))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "began": self.began,
            "command": " ".join(self.command),
            "machine": dataclasses.asdict(self.machine),
            "settings": dataclasses.asdict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
            "tables": [table.to_dict() for table in self.tables],
            "failed": self.failed,
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(self.to_dict(), path)


def run(
    names: Sequence[str],
    report: Report,
    *,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Row | Table]:
    """Run benchmarks and yield what they find, as they find it.

    One that cannot be run here, or whose two sides turn out not to compute the same, is noted in
    ``report.failed``, and the others go on.

    Args:
        names: from :data:`NAMES`.
        report: of :meth:`Report.begin`; filled on the way.
        folder: for films, feature files and models, which are removed in the end; needs a few GB.
        say: called with what is being done.

    Raises:
        BenchmarkError: no such benchmark.
    """
    for name in names:
        if name not in NAMES:
            raise BenchmarkError(f"no benchmark is called {name!r}; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="cosettle-benchmark-", dir=folder) as temporary:
        bench = Bench(report.settings, Path(temporary), say=say)
        for name in names:
            module = importlib.import_module(f"{__package__}.{name}")
            try:
                for found in module.run(bench):
                    (report.tables if isinstance(found, Table) else report.rows).append(found)
                    yield found
            except (CosettleError, OSError, ValueError) as error:
                report.failed[name] = str(error)
