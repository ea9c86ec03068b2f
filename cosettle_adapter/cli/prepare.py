"""Extract the frames of a corpus once, so that training reads small images and decodes no video."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import frame_progress, rate

if TYPE_CHECKING:
    from rich.console import Console

HELP = "extract the frames of a corpus for training"

_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="folders of videos, lists of paths, patterns, or shards-{000..009}.tar",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=256, help="shorter side of the images")
    thinning = parser.add_mutually_exclusive_group()
    thinning.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    thinning.add_argument("--fps", type=float, help="keep so many frames a second")
    thinning.add_argument(
        "--max-frames", type=int, help="keep at most so many, spread evenly over the video"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files, 1 to 95")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that decode"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Extract, with a progress bar, and say what was left out."""
    from cosettle_adapter.training.corpora.preparation import SKIPPED_NAME, PrepareSettings, prepare

    settings = PrepareSettings(
        size=options.size,
        every=options.every,
        fps=options.fps,
        max_frames=options.max_frames,
        quality=options.quality,
    )
    with frame_progress(console) as progress:
        task = progress.add_task("videos", total=None, rate="")
        found: int | None = None

        def advance(done: int, total: int) -> None:
            nonlocal found
            found = done if found is None else found
            elapsed = progress.tasks[task].elapsed
            speed = rate(done - found, elapsed, unit="videos")
            progress.update(task, completed=done, total=total, rate=speed)

        result = prepare(
            options.data, options.output, settings, workers=options.workers, on_video=advance
        )
    for name, problem in result.skipped[:_LISTED]:
        console.print(f"skipped {name}: {problem}", style="yellow", markup=False, highlight=False)
    if result.skipped:
        more = len(result.skipped) - _LISTED
        where = result.folder / SKIPPED_NAME
        console.print(
            f"{f'and {more} more; ' if more > 0 else ''}all {len(result.skipped)} are in {where}",
            markup=False,
        )
    already = f", {result.found} of them from before" if result.found else ""
    console.print(
        f"{result.folder}: {result.frames} frames of {result.videos} videos{already}", markup=False
    )
    shown = result.folder if result.folder.is_absolute() else f"./{result.folder}"
    console.print(f"train on it with: cosettle-adapter train --data {shown}", markup=False)
    return 0
