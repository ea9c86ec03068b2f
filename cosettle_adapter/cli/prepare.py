"""Extract the frames of a corpus once, so that training reads small images and decodes no video."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter

from cosettle_adapter.cli.common import Output, console, frame_progress, rate
from cosettle_adapter.training.prepare import SKIPPED_NAME, PrepareSettings
from cosettle_adapter.training.prepare import prepare as extract

_LISTED = 20


def prepare(
    *,
    data: list[str],
    output: Output,
    settings: Annotated[PrepareSettings, Parameter(name="*")] = PrepareSettings(),
    workers: int = os.cpu_count() or 1,
) -> None:
    """Extract the frames of a corpus once, so that training reads small images.

    Args:
        data: folders of videos, lists of paths, patterns, or shards-{000..009}.tar.
        output: folder to write.
        workers: processes that decode.
    """
    out = console()
    with frame_progress(out) as progress:
        task = progress.add_task("videos", total=None, rate="")
        before: int | None = None

        def advance(done: int, total: int) -> None:
            nonlocal before
            before = done if before is None else before
            speed = rate(done - before, progress.tasks[task].elapsed, unit="videos")
            progress.update(task, completed=done, total=total, rate=speed)

        result = extract(data, output, settings, workers=workers, on_video=advance)
    for name, problem in result.skipped[:_LISTED]:
        out.print(f"skipped {name}: {problem}", style="yellow", markup=False, highlight=False)
    if result.skipped:
        more = len(result.skipped) - _LISTED
        out.print(
            f"{f'and {more} more; ' if more > 0 else ''}all {len(result.skipped)} are in "
            f"{result.folder / SKIPPED_NAME}",
            markup=False,
        )
    already = f", {result.found} of them from before" if result.found else ""
    out.print(
        f"{result.folder}: {result.frames} frames of {result.videos} videos{already}", markup=False
    )
    shown = result.folder if result.folder.is_absolute() else f"./{result.folder}"
    out.print(f"train on it with: cosettle-adapter train --data {shown}", markup=False)
