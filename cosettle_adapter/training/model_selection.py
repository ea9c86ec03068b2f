"""What a fit chooses from, and choosing without labels, on rendered clips of known motion."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import (
    SOLVERS,
    AffineMap,
    Nuisance,
    StatisticsError,
    TokenStatistics,
    apply_to_maps,
    solve_layers,
)
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.clips import neighbouring_frames
from cosettle_adapter.video.synthetic import RenderedClip, render_clip

logger = logging.getLogger(__name__)

Layers = tuple[int, ...]  # 0-based, ascending; several are concatenated

_MOST_PAIRS = 8  # the statistics of one are three matrices of (2 C)^2 doubles
_FRAMES = 8
_GRID = (18, 32)
_MOTION = 0.4
_PHOTOMETRIC = 0.7


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A projection that may be chosen.

    Attributes:
        layers: which are read.
        solver: a name of :data:`~cosettle_adapter.closed_form.SOLVERS`.
        strength: in the solver's own units.
    """

    layers: Layers
    solver: str
    strength: float

    def __str__(self) -> str:
        """Name it in full, as in ``7-whiten-1``."""
        return f"{'+'.join(map(str, self.layers))}-{self.solver}-{self.strength:g}"

    def solve(
        self, backbone: Backbone, statistics: TokenStatistics, nuisance: Nuisance = "intra"
    ) -> AffineMap:
        """Solve for its projection; several layers give no more channels than one.

        Raises:
            StatisticsError: too little data.
        """
        row = SOLVERS[self.solver]
        widths = [backbone.widths[layer] for layer in self.layers]
        return solve_layers(
            statistics,
            widths,
            lambda scaled: row.solve(scaled, self.strength, nuisance),
            out_width=widths[0] if len(widths) == 1 else min(backbone.width, sum(widths)),
        )


def layer_sets(
    backbone: Backbone,
    layers: Sequence[int] | None = None,
    concatenations: Sequence[Sequence[int]] | None = None,
) -> list[Layers]:
    """Return the sets of layers to choose from.

    Args:
        backbone: the encoder.
        layers: single layers, negative ones from the end; the upper two thirds by default.
        concatenations: sets of layers to be read together; by default :func:`pairs_with_last`,
            and none where ``layers`` are given.
    """
    if concatenations is None:
        concatenations = pairs_with_last(backbone.depth) if layers is None else ()
    singles = range(backbone.depth // 3, backbone.depth) if layers is None else layers
    wanted = [(layer,) for layer in sorted({backbone.block(layer) for layer in singles})]
    joined = [tuple(sorted({backbone.block(layer) for layer in one})) for one in concatenations]
    found: list[Layers] = list(dict.fromkeys([*wanted, *joined]))
    if not found or not all(found):
        raise ValueError("no layers to choose from; name some layers or concatenations")
    return found


def pairs_with_last(depth: int) -> list[Layers]:
    """Return the last layer beside each other one of the upper two thirds, eight at most.

    Middle layers tell places apart, the last one what they show (``weights_cards/FIT.md``).
    """
    lower = range(depth // 3, depth - 1)
    return [(layer, depth - 1) for layer in lower[:: -(-len(lower) // _MOST_PAIRS) or 1]]


def candidates(
    sets: Sequence[Layers],
    solvers: Sequence[str] = ("shrink",),
    strengths: Sequence[float] | None = None,
) -> list[Candidate]:
    """Return every combination.

    Without ``strengths`` each solver has its own default, with empty ones all that the table lists
    for it.
    """
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown or not solvers:
        raise ValueError(
            f"unknown solver {', '.join(unknown) or '(none)'}; expected {', '.join(SOLVERS)}"
        )
    found = []
    for layers, name in itertools.product(sets, solvers):
        row = SOLVERS[name]
        tried = (row.strength,) if strengths is None else tuple(strengths) or row.strengths
        found += [Candidate(layers, name, strength) for strength in tried]
    return list(dict.fromkeys(found))


def labels(chosen_from: Sequence[Candidate]) -> dict[Candidate, str]:
    """Return what tables call each candidate: its layers, and what else tells it apart."""
    several = len({(each.solver, each.strength) for each in chosen_from}) > 1
    return {
        each: "+".join(map(str, each.layers))
        + (f" {each.solver} {each.strength:g}" if several else "")
        for each in chosen_from
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


def rendered_clips(
    clips: Sequence[Path], *, patch: int, count: int, seed: int
) -> list[RenderedClip]:
    """Render clips from the first frames of videos.

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
    size = (_GRID[0] * patch, _GRID[1] * patch)
    return render_from(photos, count=count, size=size, seed=seed)


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
    layers = sorted({layer for candidate in solutions for layer in candidate.layers})
    for clip in rendered:
        images = adapter.preprocess(clip.frames)
        maps = backbone.intermediate_tokens(images, layers, norm=False)
        single = dict(zip(layers, (each.float().cpu() for each in maps), strict=True))
        joined: dict[Layers, Tensor] = {}
        for candidate, solution in solutions.items():
            if candidate.layers not in joined:
                tokens = [single[layer] for layer in candidate.layers]
                joined[candidate.layers] = torch.cat(tokens, dim=1)
            features = apply_to_maps(solution, joined[candidate.layers])
            scores[candidate] += mask_overlap(features, clip) / len(rendered)
        on_clip()
    return scores
