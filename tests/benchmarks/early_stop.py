"""What stopping early saves: `adapter(frames)` beside timm's whole encoder on normalised images.

    python tests/benchmarks/early_stop.py [--model dinov2-vits14-pypi] [--rounds 20]

The adapter gets uint8 frames, normalises them, runs its encoder up to the last layer that its
projection reads, projects and averages. timm's model, made for the one image size, runs all its
blocks and the final norm. A round times one after the other; ratios are of each round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

from cosettle_adapter import CoSettleAdapter

SIZES = ((224, 224), (280, 490), (518, 518))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    adapter = CoSettleAdapter.from_pretrained(options.model)
    layers = ", ".join(map(str, adapter.config.layers))
    print(f"{options.model} reads layers {layers} of {adapter.backbone.depth}")
    for size in SIZES:
        ratios = rounds(adapter, size, options.frames, options.rounds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{size[0]} x {size[1]}: {middle:.3f} x the frames/s of the whole encoder "
            f"(quartiles {low:.3f} to {high:.3f})",
            flush=True,
        )


def rounds(adapter: CoSettleAdapter, size: tuple[int, int], frames: int, count: int) -> list[float]:
    row = adapter.backbone.row
    encoder: Any = timm.create_model(row.architecture, num_classes=0, img_size=size).eval()
    clip = torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8)
    images = adapter.preprocess(clip)
    with torch.inference_mode():
        ours = [seconds(lambda: adapter(clip, batch_size=frames))]
        whole = [seconds(lambda: encoder.forward_features(images))]
        for _ in range(count):
            whole.append(seconds(lambda: encoder.forward_features(images)))
            ours.append(seconds(lambda: adapter(clip, batch_size=frames)))
    return [b / a for a, b in zip(ours[1:], whole[1:], strict=True)]  # the first is a warm-up


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
