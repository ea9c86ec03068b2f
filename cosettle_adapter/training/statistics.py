"""Collects the statistics of sets of layers in one pass over unlabelled clips."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import Nuisance, TokenStatistics, layer_scale
from cosettle_adapter.closed_form.affine import exact
from cosettle_adapter.correspondence import corresponding_patches, soft_correspondences
from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.corpus import Video
from cosettle_adapter.training.data import work_on
from cosettle_adapter.training.encoding import PerturbedPositions, perturbed_positions

logger = logging.getLogger(__name__)

Layers = tuple[int, ...]  # 0-based, ascending; several are concatenated

_PAIRS_PER_PASS = 4  # of the encoder


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Settings of a closed-form fit.

    Attributes:
        layers: 0-based single layers to choose from; the upper two thirds by default.
        concatenations: sets of layers to concatenate, to choose from as well; by default pairs of
            an earlier and the last layer, or none if layers are given.
        solvers: names of solvers (cosettle_adapter.closed_form.SOLVERS) to choose from.
        strengths: strengths to choose from, in the solver's units: for the ridge of shrink, the
            mean eigenvalue of S, with infinity for centring only. By default each solver's default;
            if empty, all strengths that the table lists for it. Rendered clips judge strengths
            poorly: their objects never change shape, so they favour too little damping.
        nuisance: covariance to damp: the intra-video covariance S, S and the covariance of the
            clips' means (intra+clips), or S and the position leakage (intra+positions, which
            encodes every frame twice).
        size: shorter side of the frames in pixels; rounded to whole patches.
        pairs: pairs of frames per clip and gap.
        gaps: distances of the two frames of a pair; large ones bridge occlusions.
        correspondences: hard (mutual nearest neighbours) or soft (all pairs of patches, weighted).
        rendered: number of rendered clips to choose by, if there are several candidates.
        seed: seed of the rendered motion and of perturbed positions.
    """

    layers: tuple[int, ...] | None = None
    concatenations: tuple[tuple[int, ...], ...] | None = None
    solvers: tuple[str, ...] = ("shrink",)
    strengths: tuple[float, ...] | None = None
    nuisance: Nuisance = "intra"
    size: int = 280
    pairs: int = 4
    gaps: tuple[int, ...] = (3,)
    correspondences: Literal["hard", "soft"] = "hard"
    rendered: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.gaps or min((self.pairs, *self.gaps)) < 1:
            raise ValueError(
                f"pairs and gaps must be at least 1, got pairs {self.pairs} and gaps {self.gaps}"
            )
        if self.correspondences not in ("hard", "soft"):
            raise ValueError(f"correspondences must be hard or soft, got {self.correspondences!r}")


def collect_statistics(
    backbone: Backbone,
    clips: Sequence[Video],
    sets: Sequence[Layers],
    settings: FitSettings,
    *,
    workers: int = 0,
    on_clip: Callable[[], None] = lambda: None,
) -> tuple[dict[Layers, TokenStatistics], dict[str, str]]:
    """Return the statistics of each set of layers, and unreadable clips with reasons."""
    collected = {
        layers: TokenStatistics(sum(backbone.widths[layer] for layer in layers)) for layers in sets
    }
    skipped: dict[str, str] = {}
    firsts = range(0, settings.pairs, _PAIRS_PER_PASS)
    jobs = [(clip, gap, first) for clip in clips for gap in settings.gaps for first in firsts]
    results = work_on(functools.partial(_read_pairs, settings.pairs), jobs, workers=workers)
    for number, ((clip, *_), frames) in enumerate(zip(jobs, results, strict=True), start=1):
        name = clip.name
        if isinstance(frames, FrameError):
            if name not in skipped:
                logger.warning("skipped %s: %s", name, frames)
            skipped[name] = str(frames)
        elif len(frames):
            _add(collected, backbone, frames, settings, PurePath(name).name)
        if number % (len(settings.gaps) * len(firsts)) == 0:  # the clip's last job
            for statistics in collected.values():
                statistics.end_clip()
            on_clip()
    return collected, skipped


def _read_pairs(pairs: int, job: tuple[Video, int, int]) -> Tensor:
    """Read some pairs of a clip, ``(2 P, 3, H, W)`` uint8; empty if the clip is too short."""
    clip, gap, first = job
    starts = pair_starts(clip.length(), pairs, gap)[first:][:_PAIRS_PER_PASS]
    indices = [index for start in starts for index in (start, start + gap)]
    return clip.read(indices) if indices else torch.empty(0)


def pair_starts(length: int, pairs: int, gap: int) -> list[int]:
    """Return the first frames of evenly spaced pairs; fewer than ``pairs`` in a short clip."""
    if length <= gap:
        return []
    return sorted({math.ceil((length - gap - 1) * index / pairs) for index in range(pairs)})


def _add(
    collected: Mapping[Layers, TokenStatistics],
    backbone: Backbone,
    frames: Tensor,
    settings: FitSettings,
    name: str,
) -> None:
    """Encode pairs of frames once and add them to the statistics of all sets of layers."""
    images = CoSettleAdapter.raw(backbone).preprocess(frames, size=settings.size)
    layers = sorted({layer for members in collected for layer in members})

    def encode(positions: PerturbedPositions | None = None) -> dict[int, Tensor]:
        maps = backbone.intermediate_tokens(images, layers, norm=False, positions=positions)
        return dict(zip(layers, (tokens.float() for tokens in maps), strict=True))

    tokens, perturbed = encode(), dict[int, Tensor]()
    if settings.nuisance == "intra+positions":
        seed = zlib.crc32(f"{settings.seed} {name}".encode())
        offsets = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
        offsets = repeat(offsets, "two yx -> (pairs two) yx", pairs=len(frames) // 2)
        grid = backbone.grid(images.shape[-2], images.shape[-1])
        perturbed = encode(perturbed_positions(backbone, grid, offsets))
    flat = {layer: exact(rearrange(t, "t c h w -> (t h w) c")) for layer, t in tokens.items()}
    products: dict[tuple[int, int], Tensor] = {}  # shared by all sets that contain both layers
    for members, statistics in collected.items():
        for first in members:
            for second in members:
                if (first, second) not in products:
                    products[first, second] = flat[first].T @ flat[second]
                    products[second, first] = products[first, second].T
        rows = [torch.cat([products[first, second] for second in members], 1) for first in members]
        sums = torch.cat([flat[layer].sum(0) for layer in members])
        statistics.add_moments(len(flat[members[0]]), sums, torch.cat(rows))
        widths = [backbone.widths[layer] for layer in members]
        joined = torch.cat([tokens[layer] for layer in members], dim=1)
        for pair in rearrange(joined, "(pairs two) c h w -> pairs two c h w", two=2):
            _add_pair(statistics, pair, widths, settings.correspondences)
        if perturbed:
            other = torch.cat([perturbed[layer] for layer in members], dim=1)
            views = (rearrange(maps, "t c h w -> (t h w) c") for maps in (joined, other))
            statistics.add_views(*views)


def _add_pair(
    statistics: TokenStatistics, maps: Tensor, widths: Sequence[int], how: Literal["hard", "soft"]
) -> None:
    """Match two frames ``(2, C, h, w)`` and add the matches; all layers have equal weight."""
    scale = maps.new_ones(maps.shape[1])
    if len(widths) > 1:
        centred = maps - reduce(maps, "t c h w -> 1 c 1 1", "mean")
        scale = layer_scale(reduce(centred.square(), "t c h w -> c", "mean"), widths)
    here, there = maps * rearrange(scale, "c -> c 1 1")
    if how == "soft":
        rows, columns, weights = soft_correspondences(here, there)
        statistics.add_soft_pairs(rows / scale, columns / scale, weights)
    else:
        rows, columns = corresponding_patches(here, there)
        statistics.add_pairs(rows / scale, columns / scale)
