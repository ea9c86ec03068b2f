"""Propagate the masks of the first frame through a clip and write the overlay as a video.

Try: python examples/propagate_mask.py
     python examples/propagate_mask.py clip.mp4 --mask first_frame.png --size 280 --texture

Without a clip argument the script renders one with known masks and prints the overlap with them. A
mask is a palette or grey image of the first frame's size: 0 is the background, each other value one
object. --texture paints stripes on the objects, as videowalk does, to follow their parts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.video import RenderedClip, open_frames, photographs, render_clip
from cosettle_adapter.visualization import overlay_masks, side_by_side, write_film


def main() -> None:
    options = parse_options()
    known = rendered(options.frames) if options.clip is None else None
    if known is not None and known.object_mask is not None:
        frames, ids = known.frames, known.object_mask[0].long()
    else:
        frames = read(options.clip, options.frames, options.every)
        ids = torch.from_numpy(np.array(Image.open(options.mask))).long()
        if tuple(ids.shape) != tuple(frames.shape[-2:]):
            raise SystemExit(
                f"{options.mask} is {tuple(ids.shape)}, but the frames are "
                f"{tuple(frames.shape[-2:])}; expected one palette or grey mask of their size"
            )

    adapter = CoSettleAdapter.from_pretrained(options.model)
    geometry = adapter.geometry(*frames.shape[-2:], size=options.size)
    with torch.inference_mode():
        features = adapter(frames, size=options.size)

    ids = stripes(ids, geometry.grid[0]) if options.texture else ids
    # soft labels on the feature grid, background first
    values = [0, *(value for value in ids.unique().tolist() if value not in (0, 255))]
    one_hot = torch.stack([ids == value for value in values]).float()
    first = F.interpolate(rearrange(one_hot, "k h w -> 1 k h w"), geometry.grid, mode="area")
    labels = propagate_labels(features, rearrange(first, "1 k h w -> k h w"))  # (T, K, h, w)

    contour = 0 if options.texture else 2
    overlay = overlay_masks(frames, labels[:, 1:], geometry=geometry, contour=contour)
    path = write_film(side_by_side({"clip": frames, "masks": overlay}), options.output, fps=12)
    print(f"{len(values) - 1} label(s) through {len(frames)} frames: {path}")
    if known is not None and known.object_mask is not None:
        soft = F.interpolate(labels, tuple(frames.shape[-2:]), mode="bilinear")
        predicted, truth = soft.argmax(dim=1), known.object_mask
        overlap = ((predicted > 0) & truth).sum((1, 2)) / ((predicted > 0) | truth).sum((1, 2))
        print(f"overlap (IoU) with the true masks: {100 * overlap[1:].mean():.1f} %")
        y, x = ids.nonzero().T
        places, visible = known.track(torch.stack([x, y], dim=1) + 0.5)
        time, point = visible[1:].nonzero().T
        column, row = places[1:][time, point].long().T
        right = predicted[1:][time, row, column] == ids[y, x][point]
        print(f"object pixels with their own label: {100 * right.float().mean():.1f} %")


def stripes(ids: Tensor, lines: int) -> Tensor:
    """Number ten stripes over the objects from 1; fewer on a grid with too few ``lines``."""
    painted = (ids > 0) & (ids != 255)
    rows = painted.any(dim=1).nonzero()[:, 0]
    count = min(10, max(1, len(rows) * lines // len(ids)))
    numbers = torch.zeros_like(ids)
    numbers[rows] += 1 + rearrange(torch.arange(len(rows)), "h -> h 1") * count // len(rows)
    return numbers * painted


def rendered(frames: int) -> RenderedClip:
    """Render a cat moving over a table."""
    photos = photographs()
    return render_clip(
        photos["coffee"],
        cutout=photos["chelsea"],
        frames=frames,
        size=(280, 490),
        seed=7,
        photometric=0.3,
    )


def read(clip: Path, frames: int, every: int) -> Tensor:
    chunks = open_frames(clip, FrameSelection(every=every, max_frames=frames))
    return torch.cat([chunk.frames for chunk in chunks])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", nargs="?", type=Path, help="video file or folder of images")
    parser.add_argument("--mask", type=Path, help="PNG with the masks of the clip's first frame")
    parser.add_argument("--texture", action="store_true", help="paint stripes on the objects")
    parser.add_argument("-o", "--output", type=Path, default=Path("masks.mp4"), help=".mp4 or .gif")
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, default=224, help="shorter side of encoded frames")
    parser.add_argument("--frames", type=int, default=16, help="maximum number of frames")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    options = parser.parse_args()
    if (options.clip is None) != (options.mask is None):
        parser.error("give both a clip and the --mask of its first frame, or neither")
    return options


if __name__ == "__main__":
    main()
