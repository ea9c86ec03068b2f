"""Closed-form projections: one pass over unlabelled clips, no gradients.

Corresponding patches of neighbouring frames should have equal features. How they differ instead
is measured by the intra-video covariance S; the projection centres the tokens and damps the
directions in which S is large (the paper's section 4 shrinks the same directions).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.correspondence import mutual_nearest, propagate_labels
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.frames.rendered import RenderedClip, render_clip
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.training.clips import neighbouring_frames
from cosettle_adapter.training.statistics import StatisticsError, TokenStatistics
from cosettle_adapter.version import __version__

logger = logging.getLogger(__name__)

_HELD_OUT_EVERY = 5
_RENDERED_FRAMES = 8
_RENDERED_SIZE = (18, 32)  # cells
_MOTION = 0.4
_PHOTOMETRIC = 0.7


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a projection is fitted.

    Attributes:
        layers: 0-based blocks to choose from; the upper two thirds by default.
        ridge: in units of S's mean eigenvalue; infinity only centres. Not chosen on rendered
            clips: their objects never change shape, so they favour smaller ridges than real
            videos bear.
        size: shorter side of the frames in pixels; rounded to whole patches.
        pairs: pairs of frames taken from each clip.
        gap: frames between the two of a pair.
        rendered: clips rendered for choosing the block.
        seed: of the rendered motion.
    """

    layers: tuple[int, ...] | None = None
    ridge: float = 1.0
    size: int = 280
    pairs: int = 4
    gap: int = 3
    rendered: int = 12
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Fit:
    """What :func:`fit_projection` returns.

    Attributes:
        projection: the fitted projection; ``projection.config.fit`` tells how it was made.
        scores: each block's mean overlap on rendered clips, by which it was chosen.
        skipped: clips that could not be read, and why.
    """

    projection: Projection
    scores: dict[int, float]
    skipped: dict[Path, str]


def damping(statistics: TokenStatistics, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve for the affine projection that centres and damps temporal variance.

    ``y = A (x - mean)`` with ``A = c (S + r I)^(-1/2)``, ``r`` the ridge times S's mean
    eigenvalue: directions with temporal variance far below ``r`` pass alike, those far above are
    whitened. An infinite ridge leaves ``A = c I``, centring alone. ``c`` gives the projected
    tokens unit variance per channel, as a LayerNorm would.

    Args:
        statistics: of the block's tokens.
        ridge: positive, in units of S's mean eigenvalue.

    Returns:
        Weight ``(C, C)`` and bias ``(C,)``, float32.

    Raises:
        ValueError: the ridge is not positive.
        StatisticsError: no tokens or pairs, or tokens that never vary.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    total, mean = statistics.covariance, statistics.mean
    width = len(mean)
    if math.isinf(ridge):
        weight = torch.eye(width, dtype=torch.float64)
    else:
        values, vectors = torch.linalg.eigh(statistics.intra_covariance)
        values = values.clamp_min(0)
        if not float(values.mean()) > 0:
            raise StatisticsError("corresponding patches never differ: the clips have no motion")
        weight = (vectors * (values + ridge * values.mean()).rsqrt()) @ vectors.T
    variance = (weight @ total @ weight.T).diagonal().mean()
    if not float(variance) > 0:
        raise StatisticsError("all tokens are equal: the clips show nothing")
    weight = weight / variance.sqrt()
    return weight.float(), -(weight @ mean).float()


def fit_projection(
    backbone: Backbone,
    clips: Sequence[Path],
    settings: FitSettings | None = None,
    *,
    licence: str = "",
    data: str = "",
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Fit a projection for a backbone on unlabelled clips.

    Statistics of every candidate block come from one encoder pass over pairs of neighbouring
    frames. The block is then chosen without labels: on clips rendered from frames of held-out
    videos, in which a cut-out moves over a background, by how well propagating its known mask
    keeps to it.

    Args:
        backbone: the frozen encoder.
        clips: video files; every fifth is held out when there are at least ten.
        settings: see :class:`FitSettings`.
        licence: licence to record.
        data: description of the clips to record.
        on_clip: called with the clips done and their number.

    Returns:
        The projection, the scores it was chosen by, and the clips that were skipped.

    Raises:
        StatisticsError: no clip gave a pair of frames.
    """
    settings = settings or FitSettings()
    chosen = settings.layers or tuple(range(backbone.depth // 3, backbone.depth))
    layers = tuple(sorted({backbone.block(layer) for layer in chosen}))
    adapter = CoSettleAdapter.raw(backbone)
    held_out = list(clips[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY])
    if len(clips) < 2 * _HELD_OUT_EVERY:
        held_out = list(clips)
    fitted_on = [clip for clip in clips if clip not in held_out] or list(clips)
    skipped: dict[Path, str] = {}
    total = len(fitted_on) + settings.rendered

    statistics = {layer: TokenStatistics(backbone.widths[layer]) for layer in layers}
    for done, clip in enumerate(fitted_on, start=1):
        try:
            for frames in neighbouring_frames(clip, pairs=settings.pairs, gap=settings.gap):
                images = adapter.preprocess(frames, size=settings.size)
                maps = backbone.intermediate_tokens(images, layers, norm=False)
                for layer, tokens in zip(layers, maps, strict=True):
                    _gather(statistics[layer], tokens.float())
        except (CosettleError, OSError) as error:
            logger.warning("skipped %s: %s", clip, error)
            skipped[clip] = str(error)
        on_clip(done, total)

    solutions = {layer: damping(statistics[layer], settings.ridge) for layer in layers}
    scores = dict.fromkeys(layers, 0.0)
    rendered = _rendered_clips(held_out, backbone.patch, settings)
    for done, rendered_clip in enumerate(rendered, start=len(fitted_on) + 1):
        images = adapter.preprocess(rendered_clip.frames)
        maps = backbone.intermediate_tokens(images, layers, norm=False)
        for layer, tokens in zip(layers, maps, strict=True):
            features = _apply(tokens, *solutions[layer])
            scores[layer] += mask_overlap(features, rendered_clip) / len(rendered)
        on_clip(done, total)
    layer = max(scores, key=lambda layer: scores[layer])

    config = ProjectionConfig(
        backbone=backbone.row.name,
        fingerprint=backbone.fingerprint,
        backbone_revision=backbone.revision,
        layers=(layer,),
        norm=False,
        in_width=backbone.widths[layer],
        out_width=backbone.widths[layer],
        kind="affine",
        licence=licence,
        fit=_record(settings, statistics[layer], scores, clips, skipped, data),
    )
    projection = Projection(config)
    weight, bias = solutions[layer]
    projection.load_state_dict({"linears.0.weight": weight, "linears.0.bias": bias})
    return Fit(projection.requires_grad_(False).eval(), scores, skipped)


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
    found = F.interpolate(propagated, size, mode="bilinear", align_corners=False).argmax(1).bool()
    both, either = (found & masks)[1:].sum((1, 2)), (found | masks)[1:].sum((1, 2))
    return float((both / either.clamp_min(1)).mean())


def _gather(statistics: TokenStatistics, tokens: Tensor) -> None:
    """Add the tokens ``(2, C, h, w)`` of two neighbouring frames and their matches."""
    flat = rearrange(tokens, "t c h w -> t (h w) c")
    statistics.add_tokens(rearrange(flat, "t n c -> (t n) c"))
    # Matching centred tokens finds more pairs: the common component hides the differences.
    centred = tokens - tokens.mean((0, 2, 3), keepdim=True)
    pairs, _ = mutual_nearest(centred[0], centred[1])
    here, there = flat[0, pairs[:, 0]], flat[1, pairs[:, 1]]
    if not torch.equal(here, there):  # a still frame says nothing about motion
        statistics.add_pairs(here, there)


def _apply(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    moved = F.linear(rearrange(tokens.float().cpu(), "t c h w -> t h w c"), weight, bias)
    return rearrange(moved, "t h w c -> t c h w")


def _rendered_clips(clips: Sequence[Path], patch: int, settings: FitSettings) -> list[RenderedClip]:
    """Render clips from held-out frames: the cut-out of one moves over another."""
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
            frames=_RENDERED_FRAMES,
            size=(_RENDERED_SIZE[0] * patch, _RENDERED_SIZE[1] * patch),
            motion="mixed",
            amount=_MOTION,
            photometric=_PHOTOMETRIC,
            seed=settings.seed + index,
        )
        for index in range(settings.rendered)
    ]


def _record(
    settings: FitSettings,
    statistics: TokenStatistics,
    scores: dict[int, float],
    clips: Sequence[Path],
    skipped: dict[Path, str],
    data: str,
) -> dict[str, Any]:
    return {
        "method": "centre, then damp by the intra-video covariance: c (S + r I)^(-1/2) (x - mean)",
        "data": data,
        "clips": len(clips),
        "skipped": sorted(path.name for path in skipped),
        "tokens": statistics.tokens,
        "pairs": statistics.pairs,
        "block_chosen_by": "overlap of the propagated mask of a cut-out on rendered clips",
        "overlap_by_block": {str(layer): round(score, 4) for layer, score in scores.items()},
        "settings": {
            "ridge": None if math.isinf(settings.ridge) else settings.ridge,
            "size": settings.size,
            "pairs": settings.pairs,
            "gap": settings.gap,
            "rendered": settings.rendered,
            "seed": settings.seed,
        },
        "cosettle_adapter": __version__,
    }
