"""Click a patch of a clip and see what it is similar to in every frame, raw beside adapted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.cli.options import (
    add_fusion_argument,
    add_model_arguments,
    frame_progress,
    load_adapter,
    rate,
    size,
)

if TYPE_CHECKING:
    from rich.console import Console

    from cosettle_adapter.visualization.viewer import ViewedClip

HELP = "click a patch and see what it is similar to, in a local page"

_PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("source", help="video file, folder of images, or glob pattern")
    add_model_arguments(parser)
    parser.add_argument(
        "--raw", action="store_true", help="the backbone alone; no projection is needed"
    )
    add_fusion_argument(parser)
    parser.add_argument("--size", type=size, default=280, help="shorter side, or HEIGHTxWIDTH")
    parser.add_argument("--stride", type=int, help="step between patches, for overlapping ones")
    parser.add_argument("--start", type=float, help="first second")
    parser.add_argument("--end", type=float, help="second to stop before")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    parser.add_argument("--max-frames", type=int, default=64, help="keep at most this many")
    parser.add_argument("--batch-size", type=int, default=4, help="frames a forward pass")
    parser.add_argument(
        "--port", type=int, default=_PORT, help="of this machine, or the next that is free; 0: any"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def run(options: argparse.Namespace, console: Console) -> int:
    """Encode with a progress bar, then serve until Ctrl-C."""
    from cosettle_adapter.visualization.viewer import open_server

    clip = _encoded(options, console)
    server = open_server(clip, port=options.port)
    try:
        if options.port and server.server_port != options.port:
            console.print(f"port {options.port} is taken", style="yellow", markup=False)
        console.print(f"{server.url}   Ctrl-C stops", markup=False, soft_wrap=True)
        _tell_how_to_reach(server.server_port, console)
        if not options.no_browser:
            _open_browser(server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        server.server_close()
    return 0


def _encoded(options: argparse.Namespace, console: Console) -> ViewedClip:
    from cosettle_adapter.video import probe
    from cosettle_adapter.visualization.viewer import view_clip

    info = probe(options.source)
    with console.status(f"loading {options.model}"):
        adapter = load_adapter(options, raw=options.raw, stride=options.stride)
    ranged = options.start is not None or options.end is not None
    there = None if info.frames is None or ranged else -(-info.frames // max(1, options.every))
    total = options.max_frames if there is None else min(there, options.max_frames)
    with frame_progress(console) as progress:
        task = progress.add_task(Path(options.source).name, total=total, rate="")

        def advance(done: int) -> None:
            progress.update(task, completed=done, rate=rate(done, progress.tasks[task].elapsed))

        clip = view_clip(
            adapter,
            options.source,
            size=options.size,
            start=options.start,
            end=options.end,
            every=options.every,
            max_frames=options.max_frames,
            batch_size=options.batch_size,
            fusion=options.temporal_fusion,
            on_frames=advance,
        )
        progress.update(task, total=len(clip.pictures), completed=len(clip.pictures))
    if there is not None and there > len(clip.pictures) == options.max_frames:
        spread = options.every * -(-there // options.max_frames)
        console.print(
            f"these are the first {len(clip.pictures)} frames; --every {spread} spreads them over "
            "the clip, --max-frames keeps more",
            markup=False,
        )
    return clip


def _tell_how_to_reach(port: int, console: Console) -> None:
    """The page is for this machine alone: over SSH a reader needs a tunnel."""
    if os.environ.get("SSH_CONNECTION"):
        command = f"ssh -L {port}:127.0.0.1:{port} THIS-MACHINE"
        console.print(f"from the machine you sit at, first: {command}", markup=False)


def _open_browser(url: str) -> None:
    import webbrowser

    # without a display, webbrowser would start a text browser in this very terminal
    windowed = sys.platform in ("darwin", "win32")
    if windowed or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
