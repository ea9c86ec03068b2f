"""Closed-form projections: one pass over unlabelled clips, no gradients.

Corresponding patches of neighbouring frames should have equal features. How they differ instead
is measured by the intra-video covariance S; the projection centres the tokens and damps the
directions in which S is large (the paper's section 4 shrinks the same directions). The solvers are
in :mod:`cosettle_adapter.closed_form`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone, load_backbone
from cosettle_adapter.closed_form import SOLVERS, AffineMap, TokenStatistics, solve_layers
from cosettle_adapter.projection import Projection, ProjectionConfig
from cosettle_adapter.training.corpus import Corpus, Places
from cosettle_adapter.training.model_selection import Candidate, candidates, labels, overlaps
from cosettle_adapter.training.statistics import FitSettings, collect_statistics
from cosettle_adapter.version import __version__

__all__ = ["Fit", "FitSettings", "fit", "fit_projection"]

T = TypeVar("T")

_HELD_OUT_EVERY = 5


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
    """
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **loading)
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
