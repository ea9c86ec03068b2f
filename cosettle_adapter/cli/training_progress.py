"""How a training run is doing: a bar where there is a terminal, lines where there is a log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cosettle_adapter.cli.common import frame_progress, rate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from cosettle_adapter.training.train import StepReport, Trained

_SECONDS_PER_LINE = 30.0
_LISTED = 20
_SMOOTHING = 0.1


class TrainingProgress:
    """Shows views being encoded, then steps being made."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = frame_progress(console)
        self._bar.disable = not console.is_terminal
        self._task: TaskID | None = None
        self._line_at = 0.0
        self._rate: float | None = None

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def encoded(self, done: int, total: int) -> None:
        """Show how many views are on disk."""
        if self._task is None:
            self._task = self._bar.add_task("encoding", total=total, rate="")
        speed = rate(done, self._bar.tasks[self._task].elapsed, unit="views")
        self._bar.update(self._task, completed=done, rate=speed)
        self._say(f"encoded {done} of {total} views", last=done == total)

    def begin(self, samples: int) -> None:
        """Show that the first step is under way; on a CPU it may take minutes."""
        self._task = self._bar.add_task("first step", total=None, rate="")
        self._say(f"{samples} samples an epoch; the first step is under way", last=True)

    def stepped(self, report: StepReport) -> None:
        """Show a step: loss, cycle accuracy, KL, clips a second."""
        if self._task is not None and self._rate is None:
            # what a resumed run did before does not predict how long the rest takes
            self._bar.reset(self._task, completed=report.step - 1, total=report.steps)
        before = report.clips_per_second if self._rate is None else self._rate
        self._rate = before + _SMOOTHING * (report.clips_per_second - before)
        figures = (
            f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  KL {report.kl:.3f}  "
            f"{self._rate:.1f} clips/s"
        )
        if self._task is not None:
            epoch = f"epoch {report.epoch}"
            self._bar.update(self._task, description=epoch, completed=report.step, rate=figures)
        line = f"step {report.step} of {report.steps}, epoch {report.epoch}: {figures}"
        self._say(line, last=report.step == report.steps)

    def _say(self, line: str, *, last: bool) -> None:
        """Print a line now and then where a bar would not be seen."""
        now = time.monotonic()
        if not self._console.is_terminal and (last or now - self._line_at > _SECONDS_PER_LINE):
            self._console.print(line, highlight=False)
            self._line_at = now


def print_result(console: Console, trained: Trained, output: Path) -> None:
    """Print the result, what was left out, and how to load it."""
    if trained.figures:
        columns = list(trained.figures["raw"])
        titles = [column.replace("_", " ") for column in columns]
        table = Table("projection", *titles, title="Validation", title_justify="left")
        for name, figures in trained.figures.items():
            cells = [figures[column] for column in columns]
            table.add_row(name, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
        console.print(table)
        console.print(f"chosen by overlap: after step {trained.chosen_step} of {trained.steps}")
    print_skipped(console, sorted(trained.skipped.items()))
    shown = output if output.is_absolute() else f"./{output}"
    console.print(f"load it with CoSettleAdapter.from_pretrained('{shown}')", markup=False)


def print_skipped(
    console: Console, skipped: list[tuple[str, str]], listed_in: Path | None = None
) -> None:
    """Print which videos could not be read, and why."""
    for name, reason in skipped[:_LISTED]:
        console.print(f"skipped {name}: {reason}", style="yellow", markup=False, highlight=False)
    if len(skipped) > _LISTED:
        where = f"; all {len(skipped)} are in {listed_in}" if listed_in else ""
        console.print(f"and {len(skipped) - _LISTED} more{where}", markup=False)
