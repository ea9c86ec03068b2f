"""Extract the frames of a corpus once, so that training reads small images and decodes no video."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter

from cosettle_adapter.cli.common import Output, console, frame_progress, rate
from cosettle_adapter.cli.training_progress import print_skipped
from cosettle_adapter.training.prepare import SKIPPED_NAME, PrepareSettings
from cosettle_adapter.training.prepare import prepare as extract


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
        already: int | None = None

        def advance(done: int, total: int) -> None:
            nonlocal already
            already = done if already is None else already
            speed = rate(done - already, progress.tasks[task].elapsed, unit="videos")
            progress.update(task, completed=done, total=total, rate=speed)

        count, skipped = extract(data, output, settings, workers=workers, on_video=advance)
    print_skipped(out, skipped, output / SKIPPED_NAME)
    told = f"{output}: the frames of {count} videos"
    out.print(told + (f", {already} of them from before" if already else ""), markup=False)
    shown = output if output.is_absolute() else f"./{output}"
    out.print(f"train on it with: cosettle-adapter train --data {shown}", markup=False)
