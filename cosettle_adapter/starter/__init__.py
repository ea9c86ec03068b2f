"""The starter corpus: photographs in the wheel, and clips rendered from them.

Authors, sources and licences of the photographs are in NOTICE.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.video.files import read_image
from cosettle_adapter.video.synthetic import RenderedClip, render_clip

CLIPS = 48  # each photograph twice
FRAMES = 2

_FOLDER = Path(__file__).parent


def starter_photographs() -> dict[str, Tensor]:
    """Load the photographs by name: ``(3, H, W)`` uint8, sides of 240 to 560 pixels."""
    return {path.stem: read_image(path) for path in sorted(_FOLDER.glob("*.jpg"))}


def starter_clips(size: tuple[int, int], *, skip: int = 0) -> Iterator[RenderedClip]:
    """Render the corpus: :data:`CLIPS` clips of :data:`FRAMES` frames, the same on every call.

    The camera pans, zooms and turns over a photograph, a cut-out of another photograph moves, and
    noise, exposure and sharpness vary as in a camera. The first ``skip`` clips are not rendered.
    """
    photographs = list(starter_photographs().values())
    for number in range(skip, CLIPS):
        yield render_clip(
            photographs[number % len(photographs)],
            frames=FRAMES,
            size=size,
            amount=0.5,
            seed=number,
            cutout=photographs[(number + 7) % len(photographs)],
            photometric=0.5,
        )


def known_correspondences(
    clip: RenderedClip, frame: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the numbers ``(M,)`` int64 of corresponding patches in frame 0 and in ``frame``.

    They are the patches of frame 0 whose centres are visible in ``frame``, and those they move to.
    """
    patch = torch.tensor([clip.frames.shape[-1] / grid[1], clip.frames.shape[-2] / grid[0]])
    axes = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[0]), indexing="xy")
    centres = (rearrange(torch.stack(axes), "xy h w -> (h w) xy") + 0.5) * patch
    positions, visible = clip.track(centres)
    here = visible[frame].nonzero()[:, 0]
    column, row = (positions[frame, here] / patch).long().unbind(-1)
    return here, row * grid[1] + column
