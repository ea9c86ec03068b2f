"""What a fit chooses from, and choosing without labels, on rendered clips of known motion."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import SOLVERS, AffineMap, StatisticsError, apply_to_maps
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.corpus import Video
from cosettle_adapter.training.statistics import FitSettings, Layers
from cosettle_adapter.video.synthetic import RenderedClip, render_clip

logger = logging.getLogger(__name__)

_MOST_PAIRS = 8  # the statistics of one are three matrices of (2 C)^2 doubles
_FRAMES = 8
_GRID = (18, 32)
_MOTION = 0.4
_PHOTOMETRIC = 0.7


class Candidate(NamedTuple):
    """A projection that may be chosen; ``strength`` is in the solver's own units."""

    layers: Layers
    solver: str
    strength: float

    def __str__(self) -> str:
        """Name it in full, as in ``7-whiten-1``."""
        return f"{'+'.join(map(str, self.layers))}-{self.solver}-{self.strength:g}"


def candidates(backbone: Backbone, settings: FitSettings) -> list[Candidate]:
    """Return every combination of sets of layers, solvers and strengths.

    Raises:
        ValueError: no layers, no such layer, or no such solver.
    """
    unknown = [name for name in settings.solvers if name not in SOLVERS]
    if unknown or not settings.solvers:
        raise ValueError(
            f"unknown solver {', '.join(unknown) or '(none)'}; expected {', '.join(SOLVERS)}"
        )
    found = []
    for layers, name in itertools.product(layer_sets(backbone, settings), settings.solvers):
        row, given = SOLVERS[name], settings.strengths
        tried = (row.strength,) if given is None else given or row.strengths
        found += [Candidate(layers, name, strength) for strength in tried]
    return list(dict.fromkeys(found))


def layer_sets(backbone: Backbone, settings: FitSettings) -> list[Layers]:
    """Return the sets of layers to choose from.

    By default these are the upper two thirds, each alone and, of at most eight, beside the last:
    middle layers tell places apart, the last one what they show (``weights_cards/FIT.md``).
    """
    depth, joined, singles = backbone.depth, settings.concatenations, settings.layers
    if joined is None:
        lower = range(depth // 3, depth - 1) if singles is None else range(0)
        joined = tuple((layer, depth - 1) for layer in lower[:: -(-len(lower) // _MOST_PAIRS) or 1])
    if singles is None:
        singles = tuple(range(depth // 3, depth))
    wanted = [(layer,) for layer in sorted({backbone.block(layer) for layer in singles})]
    sets = [tuple(sorted({backbone.block(layer) for layer in one})) for one in joined]
    found: list[Layers] = list(dict.fromkeys([*wanted, *sets]))
    if not found or not all(found):
        raise ValueError("no layers to choose from; name some layers or concatenations")
    return found


def labels(chosen_from: Iterable[Candidate]) -> dict[Candidate, str]:
    """Return what tables call each candidate: its layers, and what else tells it apart."""
    every = list(chosen_from)
    several = len({each[1:] for each in every}) > 1
    return {
        each: "+".join(map(str, each.layers))
        + (f" {each.solver} {each.strength:g}" if several else "")
        for each in every
    }


@torch.no_grad()
def mask_overlap(features: Tensor, clip: RenderedClip) -> float:
    """Return how well propagating the moving object's first mask keeps to it.

    Args:
        features: ``(T, C, h, w)`` of the clip's frames.
        clip: rendered with a cut-out.

    Returns:
        Mean intersection over union in pixels, frame 0 excluded; in [0, 1].
    """
    masks = clip.object_mask
    if masks is None:
        raise ValueError("the clip has no moving object; render it with a cutout")
    first = torch.stack([~masks[0], masks[0]]).float()
    grid = (features.shape[-2], features.shape[-1])
    given = F.interpolate(first[None], grid, mode="bilinear", align_corners=False)[0]
    propagated = propagate_labels(features, given)
    size = (masks.shape[-2], masks.shape[-1])
    shares = F.interpolate(propagated, size, mode="bilinear", align_corners=False)
    found = shares[:, 1] > shares[:, 0]  # argmax over two, which PyTorch takes 20 times as long for
    both, either = (found & masks)[1:].sum((1, 2)), (found | masks)[1:].sum((1, 2))
    return float((both / either.clamp_min(1)).mean())


def render_from(
    photos: Sequence[Tensor], *, count: int, size: tuple[int, int], seed: int
) -> list[RenderedClip]:
    """Render clips of (height, width) pixels in which a cut-out of one photo moves over another."""
    return [
        render_clip(
            photos[index % len(photos)],
            cutout=photos[(index + 1 + index // len(photos)) % len(photos)],
            frames=_FRAMES,
            size=size,
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
    clips: Sequence[Video],
    settings: FitSettings,
    *,
    on_clip: Callable[[], None] = lambda: None,
) -> dict[Candidate, float]:
    """Return every candidate's mean :func:`mask_overlap` on clips rendered from first frames.

    Raises:
        StatisticsError: none of the videos could be read.
    """
    photos: list[Tensor] = []
    for clip in clips:
        try:
            photos.append(clip.read([0])[0])
        except FrameError as error:
            logger.warning("%s gives no frame to render from: %s", clip.name, error)
    if not photos:
        raise StatisticsError("no held-out clip could be read, so nothing can be chosen")
    size = (_GRID[0] * backbone.patch, _GRID[1] * backbone.patch)
    adapter = CoSettleAdapter.raw(backbone)
    scores = dict.fromkeys(solutions, 0.0)
    layers = sorted({layer for candidate in solutions for layer in candidate.layers})
    for rendered in render_from(photos, count=settings.rendered, size=size, seed=settings.seed):
        images = adapter.preprocess(rendered.frames)
        maps = backbone.intermediate_tokens(images, layers, norm=False)
        single = dict(zip(layers, (each.float().cpu() for each in maps), strict=True))
        for candidate, solution in solutions.items():
            joined = torch.cat([single[layer] for layer in candidate.layers], dim=1)
            overlap = mask_overlap(apply_to_maps(solution, joined), rendered)
            scores[candidate] += overlap / settings.rendered
        on_clip()
    return scores
