"""The command that opens a local page: click a patch, see its similarity in every frame."""

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
    """Click a patch of a clip and see what it is similar to in every frame, raw beside adapted.

    Args:
        source: video file, folder of images, or glob pattern.
        raw: the backbone alone; no projection is needed.
        temporal_fusion: show fused features as well.
        size: shorter side, or HEIGHTxWIDTH.
        batch_size: frames a forward pass.
        port: of this machine, or any if it is taken; 0 for any.
        no_browser: only print the address.
    """
    out = console()
    most = select.max_frames or _FRAMES
    select = dataclasses.replace(select, max_frames=most)
    there = frames_in(source, select)  # what cannot be read is told before a model is loaded
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
            on_frames=frame_bar(progress, Path(source).name, min(there or most, most)),
        )
    if there is not None and there > len(clip.pictures) == most:
        out.print(
            f"these are the first {most} frames; --every {select.every * -(-there // most)} "
            "spreads them over the clip, --max-frames keeps more",
            markup=False,
        )
    server = ViewerServer(clip, port)
    try:
        if port and server.server_port != port:
            out.print(f"port {port} is taken", style="yellow", markup=False)
        out.print(f"{server.url}   Ctrl-C stops", markup=False, soft_wrap=True)
        if os.environ.get("SSH_CONNECTION"):  # the page is for this machine alone
            tunnel = f"ssh -L {server.server_port}:127.0.0.1:{server.server_port} THIS-MACHINE"
            out.print(f"from the machine you sit at, first: {tunnel}", markup=False)
        # without a display, webbrowser would start a text browser in this very terminal
        windowed = sys.platform in ("darwin", "win32")
        windowed = windowed or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
        if windowed and not no_browser:
            webbrowser.open(server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        out.print("stopped")
    finally:
        server.server_close()
