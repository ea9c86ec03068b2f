"""Compare raw and projected features by video object segmentation on DAVIS.

    python examples/evaluate_davis.py --data DAVIS --model dinov2-vits14-pypi --every 3

All columns come from one encoder pass per frame. Figures depend on the frame size, on --every and
on the propagation protocol, so compare columns of one run only. Published tables use every frame at
480 x 880 (patch 16); the closest size for patch 14 is 476 x 882.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cosettle_adapter import CoSettleAdapter, FrameSelection, evaluation
from cosettle_adapter.evaluation.variants import RAW_LAST


def main() -> None:
    options = parse_options()
    adapter = CoSettleAdapter.from_pretrained(options.model, device=options.device)
    protocol = evaluation.davis_protocol(
        options.data,
        clips=options.clips,
        select=FrameSelection(every=options.every, max_frames=options.max_frames),
        year=options.year,
        propagation=evaluation.Propagation(options.protocol),
    )
    result = evaluation.evaluate(
        protocol,
        adapter,
        size=tuple(options.size),
        on_clip=lambda done, total, name: print(f"{done} of {total} clips {name}"),
    )
    print(f"{options.model}, projection of {adapter.config.layers}; frames at {options.size}")
    print(f"protocol {options.protocol}, every {options.every} frame(s), J&F in percent\n")
    print(f"{'':20}" + "".join(f"{name:>20}" for name in result.total))
    for clip in result.clips:
        print_row(clip, [result.first(name)[clip] for name in result.total])
    print()
    raw = result.first(RAW_LAST)
    gains = [[result.first(name)[clip] - raw[clip] for clip in raw] for name in result.total]
    print_row("all objects", [figures["J&F"] for figures in result.total.values()])
    print_row("mean - raw, clips", [sum(gain) / len(gain) for gain in gains])
    print_row("worst clip - raw", [min(gain) for gain in gains])


def print_row(name: str, values: list[float]) -> None:
    print(f"{name:20}" + "".join(f"{100 * value:20.1f}" for value in values))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with JPEGImages and Annotations"
    )
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, nargs=2, default=(476, 882), metavar=("H", "W"))
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    parser.add_argument("--max-frames", type=int, help="keep at most this many frames of a clip")
    parser.add_argument("--clips", nargs="+", help="names of clips; all of val by default")
    parser.add_argument("--year", choices=("2016", "2017"), help="by default the newest in --data")
    parser.add_argument("--protocol", choices=evaluation.LABEL_PROTOCOLS, default="best")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
