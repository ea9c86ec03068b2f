"""Closed-form projections: one pass over unlabelled clips, no gradients.

Corresponding patches of neighbouring frames should have equal features. The intra-video covariance
S measures how they differ; the projection centres the tokens and damps the directions in which S is
large (section 4 of the paper shrinks the same directions). The solvers are in
:mod:`cosettle_adapter.closed_form`. Layers are chosen without labels, on rendered clips.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone, load_backbone
from cosettle_adapter.closed_form import (
    SOLVERS,
    AffineMap,
    StatisticsError,
    TokenStatistics,
    apply_to_maps,
    solve_layers,
)
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.errors import FrameError
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.training.corpus import Corpus, Places, Video
from cosettle_adapter.training.statistics import FitSettings, Layers, collect_statistics
from cosettle_adapter.version import __version__
from cosettle_adapter.video.synthetic import RenderedClip, render_clip

__all__ = ["Fit", "FitSettings", "fit", "fit_projection"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HELD_OUT_EVERY = 5
_MAX_CONCATENATIONS = 8  # the statistics of each take three matrices of (2 C)^2 doubles
_GRID = (18, 32)
_MOTION = 0.4
_PHOTOMETRIC = 0.7


class Candidate(NamedTuple):
    """A projection to choose from; ``strength`` is in the solver's units."""

    layers: Layers
    solver: str
    strength: float

    def __str__(self) -> str:
        """Return the full name, for example ``7-whiten-1``."""
        return f"{'+'.join(map(str, self.layers))}-{self.solver}-{self.strength:g}"


class Fit(NamedTuple):
    """Projections of all candidates; ``config.fit`` of each records how it was made."""

    projections: dict[Candidate, Projection]
    chosen: Candidate
    scores: dict[Candidate, float]  # mean overlap on rendered clips; empty without any
    skipped: dict[str, str]  # unreadable clips: reason

    @property
    def projection(self) -> Projection:
        """The chosen projection."""
        return self.projections[self.chosen]


def fit(
    backbone: str | Backbone,
    clips: Places | Corpus,
    settings: FitSettings | None = None,
    *,
    licence: str | None = None,
    data: str = "",
    workers: int = 0,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> CoSettleAdapter:
    """Fit a projection for a backbone on unlabelled clips and return the adapter.

    Args:
        backbone: a registered name, ``timm:...``, ``open_clip:...``, or a loaded backbone.
        clips: folders of videos, or anything else that :meth:`Corpus.open` takes.
        settings: see :class:`FitSettings`.
        licence: licence to record; the backbone's by default.
        data: description of the clips to record.
        workers: processes that decode videos; 0 decodes in this process.
        on_clip: called with the number of clips done and the total.
        **options: fields of :class:`FitSettings` that override ``settings``; if ``backbone`` is a
            name, also arguments of :func:`~cosettle_adapter.load_backbone`.

    Returns:
        An adapter whose ``save_pretrained`` writes the same files as ``cosettle-adapter fit``.

    Raises:
        FrameError: a folder without videos.
        StatisticsError: no clip has a pair of frames.
        ValueError: settings that do not fit the backbone, or several candidates but no rendered
            clips to choose by.
        TypeError: an unknown option, or one of loading with a loaded backbone.
    """
    names = {field.name for field in dataclasses.fields(FitSettings)} & options.keys()
    given = {name: options.pop(name) for name in names}
    settings = dataclasses.replace(settings or FitSettings(), **given)
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **options)
    elif options:
        raise TypeError(f"the backbone is already loaded: omit {', '.join(options)} or give a name")
    result = fit_projection(
        backbone, clips, settings, licence=licence, data=data, workers=workers, on_clip=on_clip
    )
    return CoSettleAdapter(backbone, result.projection)


def fit_projection(
    backbone: Backbone,
    clips: Places | Corpus,
    settings: FitSettings | None = None,
    *,
    licence: str | None = None,
    data: str = "",
    workers: int = 0,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Fit the projections of all candidates; arguments and errors are those of :func:`fit`.

    One encoder pass over pairs of neighbouring frames collects the statistics of all layers. The
    candidate is then chosen without labels, by the overlap of propagated masks: on clips in which a
    cut-out moves over a background, rendered from frames of held-out videos (every fifth, if there
    are at least ten).
    """
    settings = settings or FitSettings()
    corpus = clips if isinstance(clips, Corpus) else Corpus.open(clips)
    tried = candidates(backbone, settings)
    several = len(tried) > 1
    if several and settings.rendered < 1:
        raise ValueError(
            f"got {len(tried)} projections to choose from but no rendered clips to choose by; set "
            "rendered to at least 1, or give one layer, solver and strength"
        )
    fitted_on, held_out = split(corpus.videos)
    done, total = 0, len(fitted_on) + (settings.rendered if several else 0)

    def advance() -> None:
        nonlocal done
        done += 1
        on_clip(done, total)

    sets = list(dict.fromkeys(candidate.layers for candidate in tried))
    statistics, skipped = collect_statistics(
        backbone, fitted_on, sets, settings, workers=workers, on_clip=advance
    )
    solutions = {
        candidate: _solve(backbone, candidate, statistics[candidate.layers], settings)
        for candidate in tried
    }
    scores: dict[Candidate, float] = {}
    if several:
        scores = overlaps(backbone, solutions, held_out, settings, on_clip=advance)
    chosen = max(scores, key=lambda candidate: scores[candidate]) if scores else tried[0]
    names = sorted(PurePath(name).name for name in skipped)
    about = {"data": data, "clips": len(corpus), "skipped": names}
    projections = {}
    for candidate, solution in solutions.items():
        config = ProjectionConfig(
            backbone=backbone.row.name,
            fingerprint=backbone.fingerprint,
            backbone_revision=backbone.revision,
            layers=candidate.layers,
            norm=False,
            in_width=solution.weight.shape[1],
            out_width=solution.weight.shape[0],
            kind="affine",
            licence=backbone.row.licence if licence is None else licence,
            fit=_record(settings, candidate, about, statistics[candidate.layers], scores),
        )
        projection = projections[candidate] = Projection(config).requires_grad_(False).eval()
        weights = {"weight": solution.weight.float(), "bias": solution.bias.float()}
        projection.linears[0].load_state_dict(weights)
    return Fit(projections, chosen, scores, skipped | dict(corpus.problems))


def split(clips: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the clips to fit on and the held-out ones; below ten clips, both are all clips."""
    if len(clips) < 2 * _HELD_OUT_EVERY:
        return list(clips), list(clips)
    held_out = slice(_HELD_OUT_EVERY - 1, None, _HELD_OUT_EVERY)
    fitted_on = list(clips)
    del fitted_on[held_out]
    return fitted_on, list(clips[held_out])


def _solve(
    backbone: Backbone, candidate: Candidate, statistics: TokenStatistics, settings: FitSettings
) -> AffineMap:
    """Solve for a candidate's projection; several layers are reduced to the width of one."""
    solver = SOLVERS[candidate.solver]
    widths = [backbone.widths[layer] for layer in candidate.layers]
    return solve_layers(
        statistics,
        widths,
        lambda scaled: solver.solve(scaled, candidate.strength, settings.nuisance),
        out_width=widths[0] if len(widths) == 1 else min(backbone.width, sum(widths)),
    )


def _record(
    settings: FitSettings,
    candidate: Candidate,
    about: Mapping[str, Any],
    statistics: TokenStatistics,
    scores: Mapping[Candidate, float],
) -> dict[str, Any]:
    """Return ``config.fit`` of a candidate's projection."""
    record: dict[str, Any] = {"method": SOLVERS[candidate.solver].formula, **about}
    record |= {"tokens": statistics.tokens, "pairs": statistics.pairs}
    if scores:
        record["blocks_chosen_by"] = "overlap of the propagated mask of a cut-out on rendered clips"
        named = labels(scores)
        record["overlap_by_block"] = {named[c]: round(s, 4) for c, s in scores.items()}
    strength = None if math.isinf(candidate.strength) else candidate.strength
    used = dataclasses.asdict(settings) | {"gaps": list(settings.gaps)}
    for listed in ("layers", "concatenations", "solvers", "strengths"):
        del used[listed]
    record["settings"] = {"solver": candidate.solver, "strength": strength, **used}
    return {**record, "cosettle_adapter": __version__}


def candidates(backbone: Backbone, settings: FitSettings) -> list[Candidate]:
    """Return every combination of sets of layers, solvers and strengths."""
    unknown = [name for name in settings.solvers if name not in SOLVERS]
    if unknown or not settings.solvers:
        raise ValueError(
            f"unknown solver {', '.join(unknown) or '(none)'}; expected {', '.join(SOLVERS)}"
        )
    tried: list[Candidate] = []
    for layers, name in itertools.product(layer_sets(backbone, settings), settings.solvers):
        row, strengths = SOLVERS[name], settings.strengths
        strengths = (row.strength,) if strengths is None else strengths or row.strengths
        tried += [Candidate(layers, name, strength) for strength in strengths]
    return list(dict.fromkeys(tried))


def layer_sets(backbone: Backbone, settings: FitSettings) -> list[Layers]:
    """Return the sets of layers to choose from.

    By default: each layer of the upper two thirds alone, and at most eight of them together with
    the last layer.
    """
    upper = range(backbone.depth // 3, backbone.depth)
    *lower, last = upper
    concatenations, singles = settings.concatenations, settings.layers
    if concatenations is None:
        step = max(1, math.ceil(len(lower) / _MAX_CONCATENATIONS))
        concatenations = tuple((layer, last) for layer in lower[::step]) if singles is None else ()
    if singles is None:
        singles = tuple(upper)
    alone = [(layer,) for layer in sorted({backbone.block(layer) for layer in singles})]
    joined = [tuple(sorted({backbone.block(layer) for layer in s})) for s in concatenations]
    sets: list[Layers] = list(dict.fromkeys([*alone, *joined]))
    if not sets or not all(sets):
        raise ValueError("no layers to choose from; give at least one layer or concatenation")
    return sets


def labels(tried: Iterable[Candidate]) -> dict[Candidate, str]:
    """Return the name of each candidate in tables: its layers, and the solver if they differ."""
    listed = list(tried)
    several = len({candidate[1:] for candidate in listed}) > 1
    return {
        candidate: "+".join(map(str, candidate.layers))
        + (f" {candidate.solver} {candidate.strength:g}" if several else "")
        for candidate in listed
    }


@torch.no_grad()
def mask_overlap(features: Tensor, clip: RenderedClip) -> float:
    """Return the mean IoU of an object and its propagated first mask, without frame 0, in [0, 1].

    ``features`` are ``(T, C, h, w)`` of the frames of a clip rendered with a cut-out.
    """
    masks = clip.object_mask
    if masks is None:
        raise ValueError("the clip has no moving object; render it with cutout=...")
    first = torch.stack([~masks[0], masks[0]]).float()
    grid = (features.shape[-2], features.shape[-1])
    labels = F.interpolate(first[None], grid, mode="bilinear", align_corners=False)[0]
    propagated = propagate_labels(features, labels)
    size = (masks.shape[-2], masks.shape[-1])
    scores = F.interpolate(propagated, size, mode="bilinear", align_corners=False)
    predicted = scores[:, 1] > scores[:, 0]  # 20 times as fast as argmax
    intersection = (predicted & masks)[1:].sum((1, 2))
    union = (predicted | masks)[1:].sum((1, 2))
    return float((intersection / union.clamp_min(1)).mean())


def render_from(
    photos: Sequence[Tensor], *, count: int, frames: int, size: tuple[int, int], seed: int
) -> list[RenderedClip]:
    """Render clips of (height, width) pixels in which a cut-out of one photo moves over another."""
    return [
        render_clip(
            photos[index % len(photos)],
            cutout=photos[(index + 1 + index // len(photos)) % len(photos)],
            frames=frames,
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
    """Return each candidate's mean :func:`mask_overlap` on clips rendered from first frames."""
    photos: list[Tensor] = []
    for clip in clips:
        try:
            photos.append(clip.read([0])[0])
        except FrameError as error:
            logger.warning("no frame of %s to render clips from: %s", clip.name, error)
    if not photos:
        raise StatisticsError(
            f"none of the {len(clips)} held-out clips can be read, so no projection can be chosen; "
            "give readable clips, or one layer, solver and strength"
        )
    size = (_GRID[0] * backbone.patch, _GRID[1] * backbone.patch)
    adapter = CoSettleAdapter.raw(backbone)
    scores = dict.fromkeys(solutions, 0.0)
    layers = sorted({layer for candidate in solutions for layer in candidate.layers})
    # Two frames of a motion choose as well as eight, at a sixth of the cost.
    for rendered in render_from(
        photos, count=settings.rendered, frames=2, size=size, seed=settings.seed
    ):
        images = adapter.preprocess(rendered.frames)
        maps = backbone.intermediate_tokens(images, layers, norm=False)
        single = dict(zip(layers, (tokens.float().cpu() for tokens in maps), strict=True))
        for candidate, solution in solutions.items():
            joined = torch.cat([single[layer] for layer in candidate.layers], dim=1)
            overlap = mask_overlap(apply_to_maps(solution, joined), rendered)
            scores[candidate] += overlap / settings.rendered
        on_clip()
    return scores
