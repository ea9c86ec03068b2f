"""One pass over unlabelled clips: the statistics of sets of layers."""

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

_PAIRS_AT_ONCE = 4  # in the encoder


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a projection is fitted.

    Attributes:
        layers: 0-based single layers to choose from; the upper two thirds by default.
        concatenations: sets of layers to be read together, to choose from as well; the last layer
            beside each earlier one by default, none by default where layers are given.
        solvers: names of solvers (cosettle_adapter.closed_form.SOLVERS) to choose from.
        strengths: to choose from, in units of the solvers, which are S's mean eigenvalue for the
            ridge of shrink, where infinity only centres. Each solver's default by default;
            all that the table lists for it if empty. Rendered clips are a poor judge of them:
            their objects never change shape, so they favour less damping than real videos bear.
        nuisance: what to damp: the intra-video covariance S, S and the covariance of the clips'
            means (intra+clips), or S and the position leakage (intra+positions, which encodes
            every frame twice).
        size: shorter side of the frames in pixels; rounded to whole patches.
        pairs: pairs of frames taken from each clip at each gap.
        gaps: frames between the two of a pair; long ones reach past occlusions.
        correspondences: hard for mutual nearest neighbours, soft for all pairs of patches by
            weight.
        rendered: clips rendered for choosing; 0 where there is nothing to choose.
        seed: of the rendered motion, and of perturbed positions.
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
                "a fit needs at least 1 pair of each clip, of frames at least 1 apart, got "
                f"pairs {self.pairs} and gaps {self.gaps}"
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
    """Collect statistics in one encoder pass over pairs of neighbouring frames.

    Returns:
        The statistics of each set of layers, and the clips that could not be read, and why.
    """
    found = {one: TokenStatistics(sum(backbone.widths[layer] for layer in one)) for one in sets}
    skipped: dict[str, str] = {}
    firsts = range(0, settings.pairs, _PAIRS_AT_ONCE)
    turns = [(clip, gap, first) for clip in clips for gap in settings.gaps for first in firsts]
    read = functools.partial(_read_pairs, settings.pairs)
    frames_of_turns = work_on(read, turns, workers=workers)
    for number, ((clip, *_), frames) in enumerate(
        zip(turns, frames_of_turns, strict=True), start=1
    ):
        name = clip.name
        if isinstance(frames, FrameError):
            if name not in skipped:
                logger.warning("skipped %s: %s", name, frames)
            skipped[name] = str(frames)
        elif len(frames):
            _add(found, backbone, frames, settings, PurePath(name).name)
        if number % (len(settings.gaps) * len(firsts)) == 0:  # the clip's last turn
            for statistics in found.values():
                statistics.end_clip()
            on_clip()
    return found, skipped


def _read_pairs(pairs: int, turn: tuple[Video, int, int]) -> Tensor:
    """Read a few pairs of a clip, ``(2 P, 3, H, W)`` uint8; none of a short one."""
    clip, gap, first = turn
    starts = pair_starts(clip.length(), pairs, gap)[first:][:_PAIRS_AT_ONCE]
    indices = [index for start in starts for index in (start, start + gap)]
    return clip.read(indices) if indices else torch.empty(0)


def pair_starts(length: int, pairs: int, gap: int) -> list[int]:
    """Return the first frames of pairs that are spread evenly; a short clip gives fewer."""
    if length <= gap:
        return []
    return sorted({math.ceil((length - gap - 1) * index / pairs) for index in range(pairs)})


def _add(
    found: Mapping[Layers, TokenStatistics],
    backbone: Backbone,
    frames: Tensor,
    settings: FitSettings,
    name: str,
) -> None:
    """Encode pairs of frames once, for all sets of layers."""
    images = CoSettleAdapter.raw(backbone).preprocess(frames, size=settings.size)
    layers = sorted({layer for one in found for layer in one})

    def encoded(positions: PerturbedPositions | None = None) -> dict[int, Tensor]:
        maps = backbone.intermediate_tokens(images, layers, norm=False, positions=positions)
        return dict(zip(layers, (each.float() for each in maps), strict=True))

    tokens, hidden = encoded(), dict[int, Tensor]()
    if settings.nuisance == "intra+positions":
        seed = zlib.crc32(f"{settings.seed} {name}".encode())
        offsets = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
        offsets = repeat(offsets, "two yx -> (pairs two) yx", pairs=len(frames) // 2)
        grid = backbone.grid(images.shape[-2], images.shape[-1])
        hidden = encoded(perturbed_positions(backbone, grid, offsets))
    flat = {layer: exact(rearrange(t, "t c h w -> (t h w) c")) for layer, t in tokens.items()}
    products: dict[tuple[int, int], Tensor] = {}  # shared by the sets that a layer is in
    for one, statistics in found.items():
        for first in one:
            for second in one:
                if (first, second) not in products:
                    products[first, second] = flat[first].T @ flat[second]
                    products[second, first] = products[first, second].T
        rows = [torch.cat([products[first, second] for second in one], dim=1) for first in one]
        sums = torch.cat([flat[layer].sum(0) for layer in one])
        statistics.add_moments(len(flat[one[0]]), sums, torch.cat(rows))
        widths = [backbone.widths[layer] for layer in one]
        joined = torch.cat([tokens[layer] for layer in one], dim=1)
        for pair in rearrange(joined, "(pairs two) c h w -> pairs two c h w", two=2):
            _add_pair(statistics, pair, widths, settings.correspondences)
        if hidden:
            other = torch.cat([hidden[layer] for layer in one], dim=1)
            views = (rearrange(each, "t c h w -> (t h w) c") for each in (joined, other))
            statistics.add_views(*views)


def _add_pair(
    statistics: TokenStatistics, maps: Tensor, widths: Sequence[int], how: Literal["hard", "soft"]
) -> None:
    """Match two frames; of several layers, each counts alike."""
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
