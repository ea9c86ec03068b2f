"""``extract`` from a film to a feature file beside the encoder alone; memory against length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.benchmark import child
from cosettle_adapter.benchmark.bench import Bench, Settings, close, in_batches, rounding
from cosettle_adapter.benchmark.clips import film, read_film
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.others.bare_backbone import BareBackbone
from cosettle_adapter.benchmark.row import Row, Target, faster
from cosettle_adapter.benchmark.spread import Ratio, Spread
from cosettle_adapter.extraction import extract
from cosettle_adapter.feature_file import read_features

NAME = "stream"
ABOUT = "extract from an mp4 to a feature file beside the bare backbone on frames in memory"

_MEBIBYTE = 2**20
_FILM = (480, 854)


def run(bench: Bench) -> Iterator[Row]:
    """Measure frames a second from file to file, and the peak memory of short and long films."""
    yield _speed(bench)
    yield from _memory(bench)


def _speed(bench: Bench) -> Row:
    adapter = bench.adapter
    count = bench.pick(512 if bench.on_gpu else 48, 8)
    batch = bench.batch_size(32 if bench.on_gpu else 8)
    size = bench.settings.size or bench.pick(518 if bench.on_gpu else 280, 48)
    bench.say("rendering a film")
    source = film(bench.folder / "stream.mp4", count, bench.pick(_FILM, (96, 160)))
    target = bench.folder / "stream.safetensors"
    images = adapter.preprocess(read_film(source), size=size).to(bench.dtype)
    height, width = images.shape[-2:]
    bare = BareBackbone(adapter, (height, width))

    def ours() -> None:
        extract(adapter, source, target, size=size, batch_size=batch, overwrite=True)

    def other() -> None:
        for part in in_batches(images, batch):
            bare(part)
        _wait(bench.device)

    ours()
    with torch.no_grad():
        expected = torch.cat(
            [adapter.projection(bare(part).clone()).cpu() for part in in_batches(images, batch)]
        )
    check = close(
        "stored features",
        read_features(target).features,
        expected,
        tolerance=rounding(bench.dtype),
    )
    timed = bench.in_turn(NAME, ours, other, repeats=bench.repeats(5))
    frame = "{} x {}".format(*bench.pick(_FILM, (96, 160)))
    return faster(
        timed,
        count,
        unit="frames/s",
        benchmark=NAME,
        title="mp4 to feature file, frames/s against the bare backbone on frames in memory",
        what=f"extract: {bench.settings.model}, {count} frames of {frame} H.264 to a safetensors "
        f"file, encoded at {height} x {width}, batches of {batch}, {bench.settings.dtype}, "
        f"{bench.weights}",
        beside="timm's own model on the same frames, in memory, resized and normalised already",
        target=Target(0.90, at_least=True),
        check=check,
        note="decoding and writing hide behind the encoder only where a core is free for them",
    )


def _memory(bench: Bench) -> Iterator[Row]:
    if bench.on_gpu:
        return
    short, long = bench.pick((100, 5000), (8, 40))
    size = bench.pick((112, 112), (64, 64))
    patch = bench.adapter.backbone.patch
    sides = [math.ceil(side / patch) * patch for side in size]
    peaks: dict[int, list[float]] = {short: [], long: []}
    for count in peaks:
        bench.say(f"{NAME}: rendering {count} frames")
        film(bench.folder / f"{count}.mp4", count, (sides[0], sides[1]))
    for turn in range(bench.pick(3, 1)):
        for count in sorted(peaks, reverse=turn % 2 == 1):
            bench.say(f"{NAME}: memory of {count} frames")
            try:
                peak = child.call(
                    __name__,
                    "peak_of_extraction",
                    settings=vars(bench.settings),
                    source=str(bench.folder / f"{count}.mp4"),
                    destination=str(bench.folder / f"{count}.safetensors"),
                )
            except BenchmarkError as error:
                bench.say(f"memory is left out: {error}")
                return
            peaks[count].append(peak / _MEBIBYTE)
    yield Row(
        benchmark=NAME,
        title=f"mp4 to feature file, peak memory of {long:,} frames against {short}",
        what=f"peak memory of extract over {long} frames of {sides[0]} x {sides[1]}, "
        f"{bench.settings.model}, the whole process",
        beside=f"over {short} frames",
        figure=Ratio.of(peaks[long], peaks[short]),
        form="{:.3f} x",
        unit="MiB",
        ours=Spread.of(peaks[long]),
        other=Spread.of(peaks[short]),
        target=Target(1.05, at_least=False),
        check="both files hold every frame",
        samples={"ours_mib": peaks[long], "other_mib": peaks[short]},
    )


def peak_of_extraction(settings: dict[str, Any], source: str, destination: str) -> int:
    """Extract in this process and return its peak memory in bytes."""
    child.peak_bytes()
    bench = Bench(Settings(**settings), Path(destination).parent)
    adapter = bench.adapter
    child.forget_peak()
    extract(adapter, source, destination, overwrite=True)
    return child.peak_bytes()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
