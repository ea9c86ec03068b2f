"""The command that opens a local page: click a patch, see its similarity in every frame."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from cosettle_adapter.cli.common import ModelOptions, Size, console, frame_progress, rate
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.video import FrameSelection, probe

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.visualization.viewed_clip import ViewedClip

_FRAMES = 64


def view(
    source: str,
    /,
    *,
    model: ModelOptions = ModelOptions(),
    select: Annotated[FrameSelection, Parameter(name="*")] = FrameSelection(max_frames=_FRAMES),
    raw: bool = False,
    temporal_fusion: FusionMode | None = None,
    size: Size = 280,
    batch_size: int = 4,
    port: int = 8765,
    no_browser: bool = False,
) -> None:
    """Click a patch of a clip and see what it is similar to in every frame, raw beside adapted.

    Args:
        source: video file, folder of images, or glob pattern.
        raw: the backbone alone; no projection is needed.
        temporal_fusion: show fused features as well.
        size: shorter side, or HEIGHTxWIDTH.
        batch_size: frames a forward pass.
        port: of this machine, or the next that is free; 0 for any.
        no_browser: only print the address.
    """
    from cosettle_adapter.visualization.viewer_server import open_server

    out = console()
    select = dataclasses.replace(select, max_frames=select.max_frames or _FRAMES)
    frames = probe(source).frames  # a source that cannot be read is told before a model is loaded
    with out.status(f"loading {model.model}"):
        adapter = model.load(raw=raw)
    clip = _encoded(adapter, source, frames, select, size, batch_size, temporal_fusion, out)
    server = open_server(clip, port=port)
    try:
        if port and server.server_port != port:
            out.print(f"port {port} is taken", style="yellow", markup=False)
        out.print(f"{server.url}   Ctrl-C stops", markup=False, soft_wrap=True)
        _tell_how_to_reach(server.server_port, out)
        if not no_browser:
            _open_browser(server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        out.print("stopped")
    finally:
        server.server_close()


def _encoded(
    adapter: CoSettleAdapter,
    source: str,
    frames: int | None,
    select: FrameSelection,
    size: Size,
    batch_size: int,
    fusion: FusionMode | None,
    out: Console,
) -> ViewedClip:
    from cosettle_adapter.visualization.viewed_clip import view_clip

    most = select.max_frames or _FRAMES
    ranged = select.start is not None or select.end is not None
    there = None if frames is None or ranged else -(-frames // select.every)
    with frame_progress(out) as progress:
        task = progress.add_task(Path(source).name, total=min(there or most, most), rate="")

        def advance(done: int) -> None:
            progress.update(task, completed=done, rate=rate(done, progress.tasks[task].elapsed))

        clip = view_clip(
            adapter,
            source,
            select=select,
            size=size,
            batch_size=batch_size,
            fusion=fusion,
            on_frames=advance,
        )
        progress.update(task, total=len(clip.pictures), completed=len(clip.pictures))
    if there is not None and there > len(clip.pictures) == most:
        spread = select.every * -(-there // most)
        out.print(
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
