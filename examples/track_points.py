"""Track a lattice of points through a clip, and write the film of their trails.

Try: python examples/track_points.py
     python examples/track_points.py clip.mp4 --size 280 --points 12

Points are matched with the first frame by their features alone: no motion model, no smoothing. A
point whose match does not lead back home is drawn as a ring: it is probably hidden. Without a clip,
one is rendered whose motion is known, and the error is printed, raw features beside adapted ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.correspondence import track_points
from cosettle_adapter.evaluation.variants import ADAPTED, RAW_LAST, compare_features
from cosettle_adapter.video import (
    RenderedClip,
    open_frames,
    photographs,
    render_clip,
)
from cosettle_adapter.visualization import draw_tracks, side_by_side, write_film

HOME = 1.5  # cells; a match that comes home farther off is probably a wrong one


def main() -> None:
    options = parse_options()
    clip: RenderedClip | None = None
    if options.clip is None:
        clip = rendered(options.frames)
        frames = clip.frames
    else:
        chunks = open_frames(
            options.clip, FrameSelection(every=options.every, max_frames=options.frames)
        )
        frames = torch.cat([chunk.frames for chunk in chunks])

    adapter = CoSettleAdapter.from_pretrained(options.model)
    geometry = adapter.geometry(*frames.shape[-2:], size=options.size)
    kinds = compare_features(adapter, frames, size=options.size)
    points = lattice(*frames.shape[-2:], options.points)

    panels = {}
    for name in (RAW_LAST, ADAPTED):
        tracks = track_points(kinds[name], geometry.pixels_to_cells(points))
        positions = geometry.cells_to_pixels(tracks.positions)  # (T, N, 2) of (x, y)
        panels[name] = draw_tracks(frames, positions, tracks.cycle_error < HOME)
        if clip is not None:
            true, visible = clip.track(points)
            error = (positions - true).norm(dim=-1)[visible]
            print(f"{name:15} {error.mean():5.1f} px from the true positions on average")
    path = write_film(side_by_side(panels), options.output, fps=12)
    print(f"{len(points)} points through {len(frames)} frames: {path}")


def lattice(height: int, width: int, points: int) -> Tensor:
    """``(N, 2)`` of (x, y): ``points`` a row, as many rows as fit squarely."""
    step = width / points
    x = step * (torch.arange(points) + 0.5)
    rows = max(1, round(height / step))
    y = height / rows * (torch.arange(rows) + 0.5)
    return rearrange(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1), "h w xy -> (h w) xy")


def rendered(frames: int) -> RenderedClip:
    """A cat moves over a table under a moving camera."""
    photos = photographs()
    return render_clip(
        photos["coffee"],
        cutout=photos["chelsea"],
        frames=frames,
        size=(280, 490),
        seed=7,
        photometric=0.3,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", nargs="?", type=Path, help="video file or folder of images")
    parser.add_argument("-o", "--output", type=Path, default=Path("tracks.mp4"), help=".mp4, .gif")
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, default=224, help="shorter side, as encoded")
    parser.add_argument("--points", type=int, default=10, help="a row")
    parser.add_argument("--frames", type=int, default=16, help="at most this many")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    return parser.parse_args()


if __name__ == "__main__":
    main()
