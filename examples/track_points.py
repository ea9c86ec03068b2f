"""Track a lattice of points through a clip and write a video of their trails.

Try: python examples/track_points.py
     python examples/track_points.py clip.mp4 --size 280 --points 12

Points are matched with the first frame by their features only, without motion model or smoothing. A
point is drawn as a ring if its match does not lead back to it: it is probably occluded. Without a
clip argument the script renders one with known motion and prints the error of raw and adapted
features.
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

MAX_CYCLE_ERROR = 1.5  # patches between a point and the match of its match; more is unreliable


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
        panels[name] = draw_tracks(frames, positions, tracks.cycle_error < MAX_CYCLE_ERROR)
        if clip is not None:
            true, visible = clip.track(points)
            error = (positions - true).norm(dim=-1)[visible]
            print(f"{name:15} {error.mean():5.1f} px from the true positions on average")
    path = write_film(side_by_side(panels), options.output, fps=12)
    print(f"{len(points)} points through {len(frames)} frames: {path}")


def lattice(height: int, width: int, points: int) -> Tensor:
    """Return points ``(N, 2)`` of (x, y): ``points`` per row, and rows about as far apart."""
    step = width / points
    x = step * (torch.arange(points) + 0.5)
    rows = max(1, round(height / step))
    y = height / rows * (torch.arange(rows) + 0.5)
    return rearrange(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1), "h w xy -> (h w) xy")


def rendered(frames: int) -> RenderedClip:
    """Render a cat moving over a table, with a moving camera."""
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
    parser.add_argument("--size", type=int, default=224, help="shorter side of encoded frames")
    parser.add_argument("--points", type=int, default=10, help="points per row")
    parser.add_argument("--frames", type=int, default=16, help="maximum number of frames")
    parser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    return parser.parse_args()


if __name__ == "__main__":
    main()
