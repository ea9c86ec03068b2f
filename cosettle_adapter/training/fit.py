"""Closed-form projections: one pass over unlabelled clips, no gradients.

Corresponding patches of neighbouring frames should have equal features. How they differ instead
is measured by the intra-video covariance S; the projection centres the tokens and damps the
directions in which S is large (the paper's section 4 shrinks the same directions). The solvers are
in :mod:`cosettle_adapter.closed_form`. Layers are chosen without labels, on rendered clips.
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


class Fit(NamedTuple):
    """Projections of all candidates; ``projection.config.fit`` tells how each was made."""

    projections: dict[Candidate, Projection]
    chosen: Candidate
    scores: dict[Candidate, float]  # mean overlap on rendered clips, if there were any
    skipped: dict[str, str]  # clips that could not be read, and why

    @property
    def projection(self) -> Projection:
        """The chosen one."""
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
    **loading: Any,
) -> CoSettleAdapter:
    """Fit a projection for a backbone on unlabelled clips and return the two together.

    Args:
        backbone: a registered name, ``timm:...``, ``open_clip:...``, or a loaded backbone.
        clips: folders of videos, or anything else that :meth:`Corpus.open` takes.
        settings: see :class:`FitSettings`.
        licence: to record; the backbone's by default.
        data: description of the clips to record.
        workers: processes that decode; 0 decodes in this one.
        on_clip: called with the clips done and their number.
        **loading: what :func:`~cosettle_adapter.load_backbone` takes, when ``backbone`` is a name.

    Returns:
        An adapter whose ``save_pretrained`` writes what ``cosettle-adapter fit`` would.

    Raises:
        FrameError: a folder without videos.
        StatisticsError: no clip gave a pair of frames.
        ValueError: settings that this backbone cannot have, or nothing to choose by.
        TypeError: options of loading for a backbone that is loaded already.
    """
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **loading)
    elif loading:
        raise TypeError(f"the backbone is loaded already, so {', '.join(loading)} cannot be given")
    found = fit_projection(
        backbone, clips, settings, licence=licence, data=data, workers=workers, on_clip=on_clip
    )
    return CoSettleAdapter(backbone, found.projection.to(backbone.device))


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
    """Fit a projection, and tell what else was tried; arguments and errors are :func:`fit`'s.

    Statistics of every candidate's layers come from one encoder pass over pairs of neighbouring
    frames. The candidate is then chosen without labels: on clips rendered from frames of held-out
    videos (every fifth of ten clips or more), in which a cut-out moves over a background, by how
    well propagating its known mask keeps to it.
    """
    settings = settings or FitSettings()
    corpus = clips if isinstance(clips, Corpus) else Corpus.open(clips)
    every = candidates(backbone, settings)
    if len(every) > 1 and settings.rendered < 1:
        raise ValueError(
            f"{len(every)} projections to choose from and no rendered clips to choose by; render "
            "some, or leave one layer, solver and strength"
        )
    fitted_on, held_out = split(corpus.videos)
    done, total = 0, len(fitted_on) + settings.rendered

    def advance() -> None:
        nonlocal done
        done += 1
        on_clip(done, total)

    sets = list(dict.fromkeys(each.layers for each in every))
    statistics, skipped = collect_statistics(
        backbone, fitted_on, sets, settings, workers=workers, on_clip=advance
    )
    solutions = {each: _solve(backbone, each, statistics[each.layers], settings) for each in every}
    scores: dict[Candidate, float] = {}
    if settings.rendered > 0:
        scores = overlaps(backbone, solutions, held_out, settings, on_clip=advance)
    chosen = max(scores, key=lambda each: scores[each]) if scores else every[0]
    names = sorted(PurePath(name).name for name in skipped)
    about = {"data": data, "clips": len(corpus), "skipped": names}
    projections = {}
    for each, solution in solutions.items():
        config = ProjectionConfig(
            backbone=backbone.row.name,
            fingerprint=backbone.fingerprint,
            backbone_revision=backbone.revision,
            layers=each.layers,
            norm=False,
            in_width=solution.weight.shape[1],
            out_width=solution.weight.shape[0],
            kind="affine",
            licence=backbone.row.licence if licence is None else licence,
            fit=_record(settings, each, about, statistics[each.layers], scores),
        )
        projection = projections[each] = Projection(config).requires_grad_(False).eval()
        weights = {"weight": solution.weight.float(), "bias": solution.bias.float()}
        projection.linears[0].load_state_dict(weights)
    return Fit(projections, chosen, scores, skipped | dict(corpus.problems))


def split(clips: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the clips to fit on and those held out, which are the same where there are few."""
    if len(clips) < 2 * _HELD_OUT_EVERY:
        return list(clips), list(clips)
    held_out = slice(_HELD_OUT_EVERY - 1, None, _HELD_OUT_EVERY)
    fitted_on = list(clips)
    del fitted_on[held_out]
    return fitted_on, list(clips[held_out])


def _solve(
    backbone: Backbone, candidate: Candidate, statistics: TokenStatistics, settings: FitSettings
) -> AffineMap:
    """Solve for a candidate's projection; several layers give no more channels than one."""
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
    """Return ``config.fit``: how a candidate's projection was made."""
    record: dict[str, Any] = {"method": SOLVERS[candidate.solver].formula, **about}
    record |= {"tokens": statistics.tokens, "pairs": statistics.pairs}
    if scores:
        record["blocks_chosen_by"] = "overlap of the propagated mask of a cut-out on rendered clips"
        named = labels(scores)
        record["overlap_by_block"] = {named[each]: round(s, 4) for each, s in scores.items()}
    strength = None if math.isinf(candidate.strength) else candidate.strength
    used = dataclasses.asdict(settings) | {"gaps": list(settings.gaps)}
    for listed in ("layers", "concatenations", "solvers", "strengths"):
        del used[listed]
    record["settings"] = {"solver": candidate.solver, "strength": strength, **used}
    return {**record, "cosettle_adapter": __version__}


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
    upper = range(backbone.depth // 3, backbone.depth)
    *lower, last = upper
    joined, singles = settings.concatenations, settings.layers
    if joined is None:
        apart = max(1, math.ceil(len(lower) / _MOST_PAIRS))
        joined = tuple((layer, last) for layer in lower[::apart]) if singles is None else ()
    if singles is None:
        singles = tuple(upper)
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
