"""Bars over frames and videos, and what is said when all is done."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import frame_progress, rate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from cosettle_adapter.extraction import Job, Outcome

_LISTED = 50


class ExtractionProgress:
    """Bars over the frames of the video at work and, where there are several, over videos."""

    def __init__(self, console: Console, jobs: Sequence[Job], options: argparse.Namespace) -> None:
        self._bars = frame_progress(console)
        self._options = options
        self._console = console
        many = len(jobs) != 1 or options.engine != "local"
        self._videos = (
            self._bars.add_task("videos", total=len(jobs), rate="") if many and jobs else None
        )
        self._frames: TaskID | None = None
        self._found: int | None = None

    def __enter__(self) -> ExtractionProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, job: Job) -> None:
        """Show the frames of another video."""
        if self._frames is not None:
            self._bars.remove_task(self._frames)
        name = Path(job.source).name
        self._found = None
        self._frames = self._bars.add_task(name, total=self._expected(job), rate="")

    def advanced(self, frames: int) -> None:
        """Show how many frames of it are done."""
        if self._frames is None:
            return
        if self._found is None:  # an earlier run's frames say nothing of this one's rate
            self._found = max(0, frames - self._options.batch_size)
        elapsed = self._bars.tasks[-1].elapsed
        self._bars.update(self._frames, completed=frames, rate=rate(frames - self._found, elapsed))

    def finished(self, outcome: Outcome) -> None:
        """Show that it is done."""
        if self._frames is not None and outcome.extraction is not None:
            frames = outcome.extraction.frames
            self._bars.update(self._frames, total=frames, completed=frames)
        if self._videos is not None:
            self._bars.update(self._videos, advance=1)

    def retried(self, failed: Sequence[Outcome]) -> None:
        """Say that what failed is tried again."""
        self._console.print(f"trying {len(failed)} that failed again", markup=False)

    def _expected(self, job: Job) -> int | None:
        """The number of frames, as far as it can be told beforehand."""
        from cosettle_adapter.errors import CosettleError
        from cosettle_adapter.video import probe

        options = self._options
        total: int | None = None
        if options.start is None and options.end is None and not job.output.exists():
            with contextlib.suppress(CosettleError, OSError):
                count = probe(job.source).frames
                total = None if count is None else -(-count // options.every)
        if options.max_frames is not None:
            total = options.max_frames if total is None else min(total, options.max_frames)
        return total


def summarize(console: Console, outcomes: Sequence[Outcome]) -> int:
    """Say what became of every source; return the exit status."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    failed = [outcome for outcome in outcomes if outcome.error is not None]
    early = [each for each in outcomes if each.extraction and each.extraction.truncated]
    if len(outcomes) == 1 and not failed:
        say(_told(outcomes[0]))
    elif len(outcomes) > 1:
        skipped = sum(outcome.skipped for outcome in outcomes)
        written = len(outcomes) - skipped - len(failed)
        told = [f"{written} written", f"{skipped} there already", f"{len(failed)} failed"]
        say(", ".join(text for text in told if not text.startswith("0 ")) or "nothing to do")
    for outcome in early[:_LISTED]:
        reason = outcome.extraction.truncated if outcome.extraction else ""
        say(f"the source ended early: {reason}", "yellow")
    for outcome in failed[:_LISTED]:
        source = "" if outcome.job.source in str(outcome.error) else f"{outcome.job.source}: "
        say(f"failed: {source}{outcome.error}", "red")
    for group in (early, failed):
        if len(group) > _LISTED:
            say(f"and {len(group) - _LISTED} more like these")
    return 1 if failed or early else 0


def _told(outcome: Outcome) -> str:
    result = outcome.extraction
    if result is None:
        return ""
    channels, height, width = result.shape
    shape = f"features ({result.frames}, {channels}, {height}, {width}), timestamps"
    if outcome.skipped:
        return f"{result.path} is there already: {shape}"
    found = f" (went on after {result.found} frames)" if result.found else ""
    return f"{result.path}: {shape}{found}"
