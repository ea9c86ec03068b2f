"""Choosing without labels: on clips rendered from held-out frames, whose motion is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import AffineMap, StatisticsError, apply_to_maps
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.candidates import Blocks, Candidate
from cosettle_adapter.training.clips import neighbouring_frames
from cosettle_adapter.video.rendered import RenderedClip, render_clip

logger = logging.getLogger(__name__)

_FRAMES = 8
_SIZE = (18, 32)  # cells
_MOTION = 0.4
_PHOTOMETRIC = 0.7


@torch.no_grad()
def mask_overlap(features: Tensor, clip: RenderedClip) -> float:
    """Return how well propagating the moving object's first mask keeps to it.

    Args:
        features: ``(T, C, h, w)`` of the clip's frames.
        clip: rendered with a cut-out.

    Returns:
        Mean intersection over union in pixels, frame 0 excluded; in [0, 1].
    """
    if clip.object_mask is None:
        raise ValueError("the clip has no moving object; render it with a cutout")
    masks = clip.object_mask
    first = torch.stack([~masks[0], masks[0]]).float()
    grid = (features.shape[-2], features.shape[-1])
    labels = F.interpolate(first[None], grid, mode="bilinear", align_corners=False)[0]
    propagated = propagate_labels(features, labels)
    size = (masks.shape[-2], masks.shape[-1])
    shares = F.interpolate(propagated, size, mode="bilinear", align_corners=False)
    found = shares[:, 1] > shares[:, 0]  # argmax over two, which PyTorch takes 20 times as long for
    both, either = (found & masks)[1:].sum((1, 2)), (found | masks)[1:].sum((1, 2))
    return float((both / either.clamp_min(1)).mean())


def rendered_clips(
    clips: Sequence[Path], *, patch: int, count: int, seed: int
) -> list[RenderedClip]:
    """Render clips from frames of videos: the cut-out of one moves over another.

    Raises:
        StatisticsError: none of the videos could be read.
    """
    photos: list[Tensor] = []
    for clip in clips:
        try:
            photos.append(next(neighbouring_frames(clip, pairs=1, gap=1))[0])
        except (CosettleError, OSError, StopIteration) as error:
            logger.warning("%s gives no frame to render from: %s", clip, error)
    if not photos:
        raise StatisticsError("no held-out clip could be read, so nothing can be chosen")
    return [
        render_clip(
            photos[index % len(photos)],
            cutout=photos[(index + 1 + index // len(photos)) % len(photos)],
            frames=_FRAMES,
            size=(_SIZE[0] * patch, _SIZE[1] * patch),
            motion="mixed",
            amount=_MOTION,
            photometric=_PHOTOMETRIC,
            seed=seed + index,
        )
        for index in range(count)
    ]


def overlaps(
    backbone: Backbone,
    solutions: Mapping[Candidate, AffineMap],
    rendered: Sequence[RenderedClip],
    *,
    on_clip: Callable[[], None] = lambda: None,
) -> dict[Candidate, float]:
    """Return every candidate's mean :func:`mask_overlap`, from one pass over rendered clips."""
    adapter = CoSettleAdapter.raw(backbone)
    scores = dict.fromkeys(solutions, 0.0)
    layers = sorted({block for candidate in solutions for block in candidate.blocks})
    for clip in rendered:
        images = adapter.preprocess(clip.frames)
        maps = backbone.intermediate_tokens(images, layers, norm=False)
        single = dict(zip(layers, (each.float().cpu() for each in maps), strict=True))
        joined: dict[Blocks, Tensor] = {}
        for candidate, solution in solutions.items():
            blocks = candidate.blocks
            if blocks not in joined:
                joined[blocks] = torch.cat([single[block] for block in blocks], dim=1)
            features = apply_to_maps(solution, joined[blocks])
            scores[candidate] += mask_overlap(features, clip) / len(rendered)
        on_clip()
    return scores
