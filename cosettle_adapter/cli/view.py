"""The command ``view``: a local page that shows what a clicked patch is similar to."""

from __future__ import annotations

import dataclasses
import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from cosettle_adapter.cli.common import (
    ModelOptions,
    Size,
    console,
    frame_bar,
    frame_progress,
    frames_in,
)
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.video import FrameSelection
from cosettle_adapter.visualization.viewer import ViewerServer, view_clip

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
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=65536))] = 8765,
    no_browser: bool = False,
) -> None:
    """Show in a browser what a clicked patch is similar to in every frame, raw beside adapted.

    Args:
        source: video file, folder of images, or pattern of images.
        raw: show the backbone alone, without a projection.
        temporal_fusion: also show features fused over time.
        size: size of the encoded frames: shorter side, or HEIGHTxWIDTH.
        batch_size: frames per forward pass.
        port: port of the page; if it is taken, any free port; 0 for any.
        no_browser: print the address without opening a browser.
    """
    out = console()
    most = select.max_frames or _FRAMES
    select = dataclasses.replace(select, max_frames=most)
    available = frames_in(source, select)  # an unreadable source fails before a model is loaded
    with out.status(f"loading {model.model}"):
        adapter = model.load(raw=raw)
    with frame_progress(out) as progress:
        clip = view_clip(
            adapter,
            source,
            select=select,
            size=size,
            batch_size=batch_size,
            fusion=temporal_fusion,
            on_frames=frame_bar(progress, Path(source).name, min(available or most, most)),
        )
    if available is not None and available > len(clip.pictures) == most:
        out.print(
            f"these are the first {most} frames; --every {select.every * -(-available // most)} "
            "spreads them over the clip, --max-frames keeps more",
            markup=False,
        )
    server = ViewerServer(clip, port)
    try:
        if port and server.server_port != port:
            out.print(f"port {port} is taken", style="yellow", markup=False)
        out.print(f"{server.url}   Ctrl-C stops", markup=False, soft_wrap=True)
        if os.environ.get("SSH_CONNECTION"):  # the server accepts local connections only
            tunnel = f"ssh -L {server.server_port}:127.0.0.1:{server.server_port} THIS-MACHINE"
            out.print(f"first run on your own machine: {tunnel}", markup=False)
        # without a display, webbrowser would start a text browser in this terminal
        display = sys.platform in ("darwin", "win32")
        display = display or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
        if display and not no_browser:
            webbrowser.open(server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        out.print("stopped")
    finally:
        server.server_close()
