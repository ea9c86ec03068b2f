"""What temporal fusion costs beside the encoder, in time and in memory.

    python tests/benchmarks/fusion.py [--threads 2] [--rounds 12]

Random weights, float32, 34 x 63 patches. A round times the full encoder of timm on a frame and the
fusion of a frame, one after the other, so that both see the same state of the machine; ratios are
of each round. Memory is the peak of processes of their own, with the encoder and with both. At
last 10,000 small frames are streamed with fusion, and the memory at 1,000 and at 10,000 is told.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.correspondence import TemporalFusion

ENCODERS = {"ViT-S/14": "vit_small_patch14_dinov2", "ViT-B/14": "vit_base_patch14_dinov2"}
GRID = (34, 63)
WARM = 4  # frames, so that all neighbours are there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(child(*options.child))
        return
    for name in ENCODERS:
        times(name, options.rounds)
        alone, both = (peak(options.threads, name, what) for what in ("encoder", "both"))
        print(f"  peak memory {alone:.0f} MB, with fusion {both:.0f} MB: +{both - alone:.0f} MB")
    print(f"10,000 frames of 48 x 64: {peak(options.threads, 'stream')} MB at 1,000 and at the end")


@torch.inference_mode()
def times(name: str, rounds: int) -> None:
    encoder, image = model(name)
    frames = moving(encoder.num_features)
    for mode in ("symmetric", "causal"):
        fusion = TemporalFusion(mode)  # type: ignore[arg-type]
        for _ in range(WARM):
            fusion.push(next(frames))
        encoder.forward_features(image)
        encoding, fusing = [], []
        for _ in range(rounds):
            encoding.append(seconds(partial(encoder.forward_features, image)))
            fusing.append(seconds(partial(fusion.push, next(frames))))
        low, middle, high = statistics.quantiles(
            [100 * b / a for a, b in zip(encoding, fusing, strict=True)], n=4
        )
        print(
            f"{name} {mode}: encoder {1e3 * statistics.median(encoding):.0f} ms, fusion "
            f"{1e3 * statistics.median(fusing):.0f} ms a frame: {middle:.1f} % "
            f"(quartiles {low:.1f} to {high:.1f})",
            flush=True,
        )


def child(what: str, name: str = "") -> str:
    """Peak memory in MB."""
    if what == "stream":
        return streamed()
    encoder, image = model(name)
    fusion = TemporalFusion()
    with torch.inference_mode():
        for frame in (next(frames) for frames in [moving(encoder.num_features)] for _ in range(8)):
            encoder.forward_features(image)
            if what == "both":
                fusion.push(frame)
    return f"{megabytes():.0f}"


def streamed() -> str:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from training_fakes import small_backbone

    adapter = CoSettleAdapter.raw(small_backbone())
    photo = torch.randint(0, 256, (3, 48, 320), dtype=torch.uint8)
    frames = (photo[..., t % 256 : t % 256 + 64] for t in range(10_000))
    told = []
    for chunk in adapter.stream(frames, batch_size=8, temporal_fusion="symmetric"):
        if chunk.start in (1000, 9992):
            told.append(f"{megabytes():.0f}")
    return " and ".join(told)


def peak(threads: int, *what: str) -> float | str:
    arguments = [sys.executable, __file__, "--threads", str(threads), "--child", *reversed(what)]
    said = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip()
    return float(said) if said.isdigit() else said


def model(name: str) -> tuple[nn.Module, Tensor]:
    size = (14 * GRID[0], 14 * GRID[1])
    encoder = timm.create_model(ENCODERS[name], img_size=size).eval()
    return encoder, torch.randn(1, 3, *size)


def moving(channels: int) -> Iterator[Tensor]:
    """Features of a plane that moves by a patch a frame, with noise: there are no cuts."""
    plane = torch.randn(1, channels, GRID[0], GRID[1] + 64)
    place = 0
    while True:
        place = (place + 1) % 64
        clip = plane[..., place : place + GRID[1]]
        yield clip + 0.5 * torch.randn_like(clip)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def megabytes() -> float:
    """Peak memory of this process; ru_maxrss would begin with that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
