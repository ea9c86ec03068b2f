"""The starter corpus: photographs in the wheel, and clips rendered from them.

Authors, sources and licences of the photographs are in NOTICE.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image  # comes with torchvision, which timm requires
from torch import Tensor

from cosettle_adapter.video.arrays import image_to_frame
from cosettle_adapter.video.synthetic import RenderedClip, render_clip

CLIPS = 48  # each photograph twice
FRAMES = 2

_AMOUNT = 0.5
_PHOTOMETRIC = 0.5
_FOLDER = Path(__file__).parent


def starter_photographs() -> dict[str, Tensor]:
    """Load the photographs in order of name: ``(3, H, W)`` uint8, sides of 240 to 560 pixels."""
    photographs = {}
    for path in sorted(_FOLDER.glob("*.jpg")):
        with Image.open(path) as image:
            photographs[path.stem] = image_to_frame(image)
    return photographs


def starter_clips(size: tuple[int, int], *, skip: int = 0) -> Iterator[RenderedClip]:
    """Render the corpus: a camera pans, zooms and turns, and another photograph's cut-out moves.

    Noise, exposure and sharpness vary as they do in a camera. Every clip is the same on every call
    and does not depend on the others.

    Args:
        size: (H, W) of the frames.
        skip: leave out the first ones.

    Yields:
        :data:`CLIPS` clips of :data:`FRAMES` frames.
    """
    photographs = list(starter_photographs().values())
    for number in range(skip, CLIPS):
        yield render_clip(
            photographs[number % len(photographs)],
            frames=FRAMES,
            size=size,
            amount=_AMOUNT,
            seed=number,
            cutout=photographs[(number + 7) % len(photographs)],
            photometric=_PHOTOMETRIC,
        )


def known_correspondences(
    clip: RenderedClip, frame: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return which patches of a frame show what patches of frame 0 show, by the known motion.

    Args:
        clip: a rendered clip.
        frame: number of the other frame.
        grid: (h, w) of patches that divide the frames evenly.

    Returns:
        ``(M,)`` int64 numbers of patches of frame 0, row by row, and of the patches of the other
        frame into which their centres move, without those that cannot be seen there.
    """
    patch = torch.tensor([clip.frames.shape[-1] / grid[1], clip.frames.shape[-2] / grid[0]])
    axes = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[0]), indexing="xy")
    centres = (rearrange(torch.stack(axes), "xy h w -> (h w) xy") + 0.5) * patch
    positions, visible = clip.track(centres)
    here = visible[frame].nonzero()[:, 0]
    column, row = (positions[frame, here] / patch).long().unbind(-1)
    return here, row * grid[1] + column
