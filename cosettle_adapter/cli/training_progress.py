"""How a training run is doing: a bar where there is a terminal, lines where there is a log."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import frame_progress, rate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from cosettle_adapter.training.loop import StepReport, Trained

_SECONDS_A_LINE = 30.0
_LISTED = 20
_SMOOTHING = 0.1


class TrainingProgress:
    """Shows views being encoded, then steps being made."""

    def __init__(self, console: Console) -> None:
        """Begin with nothing to show."""
        self._console = console
        self._bar = frame_progress(console)
        self._encoding: TaskID | None = None
        self._steps: TaskID | None = None
        self._line_at = 0.0
        self._rate: float | None = None

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def encoded(self, done: int, total: int) -> None:
        """Show how many views are on disk."""
        if self._encoding is None:
            self._encoding = self._bar.add_task("encoding", total=total, rate="")
        elapsed = self._bar.tasks[self._encoding].elapsed
        speed = rate(done, elapsed, unit="views")
        self._bar.update(self._encoding, completed=done, total=total, rate=speed)
        self._say(f"encoded {done} of {total} views", last=done == total)

    def begin(self, samples: int) -> None:
        """Show that the first step is under way; on a CPU it may take minutes."""
        self._steps = self._bar.add_task("first step", total=None, rate="")
        self._say(f"{samples} samples an epoch; the first step is under way", last=True)

    def stepped(self, report: StepReport) -> None:
        """Show a step: loss, cycle accuracy, KL, clips a second."""
        before = report.clips_per_second if self._rate is None else self._rate
        self._rate = before + _SMOOTHING * (report.clips_per_second - before)
        figures = (
            f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  KL {report.kl:.3f}  "
            f"{self._rate:.1f} clips/s"
        )
        if self._steps is None or self._bar.tasks[self._steps].total is None:
            # what a resumed run did before says nothing about how long the rest takes
            task = self._steps if self._steps is not None else self._bar.add_task("", rate="")
            self._bar.reset(task, completed=report.step - 1, total=report.steps)
            self._steps = task
        self._bar.update(
            self._steps, description=f"epoch {report.epoch}", completed=report.step, rate=figures
        )
        self._say(
            f"step {report.step} of {report.steps}, epoch {report.epoch}: {figures}",
            last=report.step == report.steps,
        )

    def _say(self, line: str, *, last: bool) -> None:
        """Print a line now and then where a bar would not be seen."""
        now = time.monotonic()
        if not self._console.is_terminal and (last or now - self._line_at > _SECONDS_A_LINE):
            self._console.print(line, highlight=False)
            self._line_at = now


def print_result(console: Console, trained: Trained, output: Path) -> None:
    """Print what came out, what was left out, and how to load it."""
    from rich.table import Table

    if trained.figures:
        table = Table(title="Validation", title_justify="left")
        columns = list(next(iter(trained.figures.values())))
        table.add_column("projection")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for name, figures in trained.figures.items():
            cells = [figures[column] for column in columns]
            table.add_row(name, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
        console.print(table)
        console.print(f"chosen by overlap: after step {trained.chosen_step} of {trained.steps}")
    if trained.skipped:
        console.print(f"skipped {len(trained.skipped)} videos that could not be read:")
        for name, reason in sorted(trained.skipped.items())[:_LISTED]:
            console.print(f"  {name}: {reason}", markup=False, highlight=False)
        if len(trained.skipped) > _LISTED:
            console.print(f"  and {len(trained.skipped) - _LISTED} more")
    shown = output if output.is_absolute() else f"./{output}"
    console.print(f"load it with CoSettleAdapter.from_pretrained('{shown}')", markup=False)
