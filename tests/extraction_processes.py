"""Extractions in processes of their own: killed in the middle, or measured.

Called as ``python extraction_processes.py kill FOLDER KIND FORMAT...``, where KIND is ``plain``,
``settle``, ``tokens`` or a mode of temporal fusion, or ``... memory FOLDER FORMAT FRAMES...``;
prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_fakes import small_backbone

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.correspondence import fusion
from cosettle_adapter.extraction import FORMATS, extract

from helpers import projection_for, write_video


def small_adapter(*, channels: int = 32) -> CoSettleAdapter:
    backbone = small_backbone()
    return CoSettleAdapter(backbone, projection_for(backbone, layers=(1,), out_width=channels))


def ill_fated_adapter(folder: Path) -> CoSettleAdapter:
    """Kills its process at the tenth batch, but once among all processes; then fails, also once."""
    adapter = small_adapter()
    batches = 0

    def happens_now(name: str) -> bool:
        try:
            (folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def misfortune(*_: object) -> None:
        nonlocal batches
        batches += 1
        if batches % 10:
            return
        if happens_now("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif happens_now("failed"):
            raise RuntimeError("out of memory")

    adapter.projection.register_forward_hook(misfortune)
    return adapter


def in_child(work: Callable[[], Any]) -> tuple[Any, int]:
    """Run ``work`` in a forked process; return its result and how the process ended."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(write, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(told) if told else None, status


def run(video: Path, output: Path, kind: str, *, kill_at: int | None = None) -> dict[str, int]:
    adapter = small_adapter()
    encoded = 0

    def count(_module: object, inputs: tuple[Any, ...], _output: object) -> None:
        nonlocal encoded
        encoded += len(inputs[0])

    adapter.projection.register_forward_hook(count)

    def on_chunk(frames: int) -> None:
        if kill_at is None:
            return
        journal = output.with_name(f".{output.name}.partial") / "journal"
        if frames >= kill_at:
            while not journal.exists() or len(journal.read_text().splitlines()) < 3:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    fusion.CUT = 0.0  # features of random weights
    named: dict[str, dict[str, Any]] = {"plain": {}, "settle": {"settle": True}}
    named["tokens"] = {"tokens": "patch,cls,mean" if output.suffix != ".parquet" else "cls"}
    how = named.get(kind, {"temporal_fusion": kind})
    result = extract(adapter, video, output, batch_size=4, on_chunk=on_chunk, **how)
    return {"frames": result.frames, "found": result.found, "encoded": encoded}


def kill(folder: Path, kind: str, formats: list[str]) -> dict[str, Any]:
    video = write_video(folder / "clip.mp4", frames=50, height=48, width=64)
    told: dict[str, Any] = {}
    for name in formats:
        suffix = FORMATS[name].suffix
        whole, broken = folder / f"whole{suffix}", folder / f"broken{suffix}"
        in_child(lambda output=whole: run(video, output, kind))
        _, status = in_child(lambda output=broken: run(video, output, kind, kill_at=20))
        there = broken.exists()
        resumed, _ = in_child(lambda output=broken: run(video, output, kind))
        told[name] = {"signal": os.WTERMSIG(status), "there": there, **resumed}
    return told


def memory(folder: Path, format: str, counts: list[int]) -> dict[str, int]:
    video = folder / "clip.mp4"

    def record() -> None:
        write_video(video, frames=max(counts), height=128, width=128)

    def peak(frames: int) -> int:
        adapter = small_adapter(channels=256)  # 64 KiB a frame, and the frame 48
        output = folder / f"{frames}{FORMATS[format].suffix}"
        select = FrameSelection(max_frames=frames)
        extract(adapter, video, output, select=select, batch_size=10)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    in_child(record)  # the encoder's memory is none of ours
    return {str(frames): in_child(lambda n=frames: peak(n))[0] for frames in counts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, place, *rest = sys.argv[1:]
    if task == "kill":
        result: object = kill(Path(place), rest[0], rest[1:])
    else:
        result = memory(Path(place), rest[0], [int(count) for count in rest[1:]])
    sys.stdout.write(json.dumps(result))
