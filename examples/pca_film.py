"""Write a video of a clip and its patch features in colour: raw, and adapted with temporal fusion.

Try: python examples/pca_film.py
     python examples/pca_film.py clip.mp4 -o film.gif --size 280 --every 2

Colours are the first three principal components, with one basis for the whole clip, so a colour
flickers only if the feature does. The components of the adapted panel are aligned with those of the
raw one. Without a clip argument the script renders one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.evaluation.variants import RAW_LAST, compare_features, feature_variants
from cosettle_adapter.starter import starter_photographs
from cosettle_adapter.video import open_frames, render_clip
from cosettle_adapter.visualization import pca_film


def main() -> None:
    options = parse_options()
    if options.clip is None:
        frames = rendered(options.frames)
    else:
        chunks = open_frames(
            options.clip, FrameSelection(every=options.every, max_frames=options.frames)
        )
        frames = torch.cat([chunk.frames for chunk in chunks])

    adapter = CoSettleAdapter.from_pretrained(options.model)
    kinds = feature_variants(adapter, fusion="symmetric")
    shown = [kind for kind in kinds if kind.name in (RAW_LAST, "adapted, fused")]
    features = compare_features(adapter, frames, size=options.size, variants=shown)
    mode = "bilinear" if options.smooth else "nearest"
    path = pca_film(frames, features, options.output, fps=options.fps, mode=mode)
    print(f"{len(frames)} frames: {path}")


def rendered(frames: int) -> Tensor:
    """Render a toy moving over a red panda, with a moving camera: ``(T, 3, H, W)`` uint8."""
    photos = starter_photographs()
    clip = render_clip(
        photos["red_panda"],
        cutout=photos["pirate"],
        frames=frames,
        size=(280, 490),
        amount=0.4,
        seed=3,
        photometric=1.0,
    )
    return clip.frames


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", nargs="?", type=Path, help="video file or folder of images")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pca.mp4"), help=".mp4, .gif, .webp or .png"
    )
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, default=224, help="shorter side of encoded frames")
    parser.add_argument("--smooth", action="store_true", help="interpolate between patches")
    parser.add_argument("--fps", type=float, default=12, help="frames per second of the video")
    parser.add_argument("--frames", type=int, default=16, help="maximum number of frames")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    return parser.parse_args()


if __name__ == "__main__":
    main()
