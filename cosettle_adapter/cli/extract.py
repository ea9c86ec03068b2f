"""Write the features of a video to a safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import (
    DTYPES,
    add_model_arguments,
    frame_progress,
    load_adapter,
    rate,
    size,
    torch_dtype,
)

if TYPE_CHECKING:
    from rich.console import Console

HELP = "write the features of a video to a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("source", help="video file, folder of images, or glob pattern")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file")
    add_model_arguments(parser)
    parser.add_argument("--size", type=size, help="shorter side, or HEIGHTxWIDTH")
    parser.add_argument("--fit", choices=("resize", "pad"), default="resize")
    parser.add_argument(
        "--layer", type=int, help="write this block's own tokens, without the projection"
    )
    parser.add_argument("--stride", type=int, help="step between patches, for overlapping ones")
    parser.add_argument("--batch-size", type=int, default=8, help="frames a forward pass")
    parser.add_argument("--storage", choices=DTYPES, help="dtype on disk; --dtype's by default")
    parser.add_argument("--start", type=float, help="first second")
    parser.add_argument("--end", type=float, help="second to stop before")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    parser.add_argument("--max-frames", type=int, help="keep at most this many")
    parser.add_argument("--fps", type=float, help="of an image folder, for its timestamps")


def run(options: argparse.Namespace, console: Console) -> int:
    """Extract, with a progress bar."""
    from cosettle_adapter.extraction import extract
    from cosettle_adapter.frames import probe

    with console.status(f"loading {options.model}"):
        adapter = load_adapter(options, layer=options.layer, stride=options.stride)
    info = probe(options.source)
    total = None if info.frames is None else -(-info.frames // options.every)
    if options.start is not None or options.end is not None:
        total = None
    if options.max_frames is not None:
        total = options.max_frames if total is None else min(total, options.max_frames)
    with frame_progress(console) as progress:
        task = progress.add_task(Path(options.source).name, total=total, rate="")

        def advance(frames: int) -> None:
            elapsed = progress.tasks[task].elapsed
            progress.update(task, completed=frames, rate=rate(frames, elapsed))

        result = extract(
            adapter,
            options.source,
            options.output,
            batch_size=options.batch_size,
            size=options.size,
            fit=options.fit,
            start=options.start,
            end=options.end,
            every=options.every,
            max_frames=options.max_frames,
            fps=options.fps,
            storage=torch_dtype(options.storage) if options.storage else None,
            on_chunk=advance,
        )
        progress.update(task, total=result.frames, completed=result.frames)
    channels, height, width = result.shape
    console.print(
        f"{result.path}: features ({result.frames}, {channels}, {height}, {width}), timestamps"
    )
    if result.truncated is not None:
        console.print(f"the source ended early: {result.truncated}", style="yellow", markup=False)
        return 1
    return 0
