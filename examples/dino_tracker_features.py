"""Features of this package in an unmodified checkout of DINO-Tracker.

    git clone https://github.com/AssafSinger94/dino-tracker
    python examples/dino_tracker_features.py \\
        --repo dino-tracker --data dino-tracker/dataset/horsejump

It makes a copy of the clip's folder (frames and masks linked) with the features in the file where
DINO-Tracker looks for its own, and prints what is left to run in DINO-Tracker's environment, which
needs a GPU; this script does not, and imports nothing of the checkout. `--raw` writes what the
projection reads of the frozen backbone in the same way, to compare with.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.dino_tracker import load_overlapping, prepare
from cosettle_adapter.errors import CosettleError


def main() -> None:
    options = parse_options()
    name = Path(options.data).expanduser().absolute().name
    frozen = options.raw or options.layer is not None
    output = options.output or f"{name}-{'raw' if frozen else 'cosettle'}"
    try:
        prepared = prepare(
            load(options),
            options.repo,
            options.data,
            output,
            stride=options.stride,
            batch_size=options.batch_size,
            rescale=options.rescale,
            temporal_fusion=options.temporal_fusion,
            location=options.load_to,
            on_frame=show_progress,
        )
    except (CosettleError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{prepared.path}: features {prepared.shape}, {prepared.scale.reason}")
    print("\n# To run in DINO-Tracker's environment:\n")
    print(prepared.script, end="")


def load(options: argparse.Namespace) -> CoSettleAdapter:
    """What computes the features; its patches overlap where they can."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    raw = partial(CoSettleAdapter.raw, options.model, layer=options.layer)
    if options.layer is not None:
        return load_overlapping(raw, options.stride, device=device)
    adapted = partial(CoSettleAdapter.from_pretrained, options.model)
    adapter = load_overlapping(adapted, options.stride, device=device)
    return adapter.without_projection() if options.raw else adapter


def show_progress(done: int, frames: int) -> None:
    end = "\n" if done == frames else ""
    print(f"\r{done} of {frames} frames", end=end, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True, help="checkout of DINO-Tracker; only read")
    parser.add_argument(
        "--data", required=True, help="clip: video/ with frames, perhaps masks/; only read"
    )
    parser.add_argument("-o", "--output", help="folder to make; DATA's name and -cosettle or -raw")
    parser.add_argument(
        "--stride", type=int, choices=(7, 14), default=7, help="pixels a cell; 14 is 4 times less"
    )
    parser.add_argument(
        "--model", default="dinov2-vits14-pypi", help="registered name, Hub repository or folder"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--raw", action="store_true", help="the frozen tokens the projection reads")
    kind.add_argument("--layer", type=int, help="this block of the frozen backbone")
    parser.add_argument(
        "--temporal-fusion",
        choices=("symmetric", "causal"),
        help="average patches with their matches in neighbouring frames",
    )
    parser.add_argument("--device", help="torch device; the GPU where there is one")
    parser.add_argument("--batch-size", type=int, default=4, help="frames a forward pass")
    parser.add_argument(
        "--no-rescale", dest="rescale", action="store_false", help="leave the features' length"
    )
    parser.add_argument(
        "--load-to",
        default="cuda:0",
        metavar="DEVICE",
        help="where DINO-Tracker finds the features when it loads them; it needs cuda:0",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
