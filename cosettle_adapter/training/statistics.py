"""One pass over unlabelled clips: the statistics of sets of layers."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.utils.data import Dataset

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import (
    Nuisance,
    TokenStatistics,
    layer_scale,
)
from cosettle_adapter.closed_form.affine import exact
from cosettle_adapter.correspondence import corresponding_patches, soft_correspondences
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.data import load_batches
from cosettle_adapter.training.positions import perturbed_positions
from cosettle_adapter.video.random_access import count_frames, read_frames

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
        if min((self.pairs, *self.gaps)) < 1:
            raise ValueError(
                "a fit needs at least 1 pair of each clip, of frames at least 1 apart, got "
                f"pairs {self.pairs} and gaps {self.gaps}"
            )


def collect_statistics(
    backbone: Backbone,
    clips: Sequence[Path],
    sets: Sequence[Layers],
    settings: FitSettings,
    *,
    workers: int = 0,
    on_clip: Callable[[], None] = lambda: None,
) -> tuple[dict[Layers, TokenStatistics], dict[Path, str]]:
    """Collect statistics in one encoder pass over pairs of neighbouring frames.

    Returns:
        The statistics of each set of layers, and the clips that could not be read, and why.
    """
    widths = {layers: [backbone.widths[layer] for layer in layers] for layers in sets}
    found = {layers: TokenStatistics(sum(width)) for layers, width in widths.items()}
    skipped: dict[Path, str] = {}
    firsts = range(0, settings.pairs, _PAIRS_AT_ONCE)
    turns = [(gap, first) for gap in settings.gaps for first in firsts]
    keys = [[(clip, *turn)] for clip in clips for turn in turns]
    pairs = load_batches(_Pairs(settings.pairs), keys, workers=workers)
    for number, ((clip, frames),) in enumerate(pairs, start=1):
        if isinstance(frames, str):
            if clip not in skipped:
                logger.warning("skipped %s: %s", clip, frames)
            skipped[clip] = frames
        elif len(frames):
            _add(found, widths, backbone, frames, settings, clip.name)
        if number % len(turns) == 0:
            for statistics in found.values():
                statistics.end_clip()
            on_clip()
    return found, skipped


class _Pairs(Dataset[Any]):
    """A clip and a few of its pairs ``(2 P, 3, H, W)`` uint8, or why there are none."""

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs

    def __getitem__(self, key: tuple[Path, int, int]) -> tuple[Path, Tensor | str]:
        clip, gap, first = key
        try:
            starts = pair_starts(count_frames(clip), self._pairs, gap)[first:][:_PAIRS_AT_ONCE]
            indices = [index for start in starts for index in (start, start + gap)]
            return clip, read_frames(clip, indices) if indices else torch.empty(0)
        except (CosettleError, OSError) as error:
            return clip, str(error)


def pair_starts(length: int, pairs: int, gap: int) -> list[int]:
    """Return the first frames of pairs that are spread evenly; a short clip gives fewer."""
    if length <= gap:
        return []
    return sorted({-(-max(length - gap - 1, 0) * index // pairs) for index in range(pairs)})


def _add(
    found: Mapping[Layers, TokenStatistics],
    widths: Mapping[Layers, list[int]],
    backbone: Backbone,
    frames: Tensor,
    settings: FitSettings,
    name: str,
) -> None:
    """Encode pairs of frames once, for all sets of layers."""
    images = CoSettleAdapter.raw(backbone).preprocess(frames, size=settings.size)
    layers = sorted({layer for one in found for layer in one})
    maps = backbone.intermediate_tokens(images, layers, norm=False)
    tokens = dict(zip(layers, (each.float() for each in maps), strict=True))
    hidden: dict[int, Tensor] = {}
    if settings.nuisance == "intra+positions":
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        seed = zlib.crc32(f"{settings.seed} {name}".encode())
        offsets = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
        offsets = repeat(offsets, "two yx -> (pairs two) yx", pairs=len(frames) // 2)
        positions = perturbed_positions(backbone, grid, offsets)
        maps = backbone.intermediate_tokens(images, layers, norm=False, positions=positions)
        hidden = dict(zip(layers, (each.float() for each in maps), strict=True))
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
        joined = torch.cat([tokens[layer] for layer in one], dim=1)
        for pair in rearrange(joined, "(pairs two) c h w -> pairs two c h w", two=2):
            _add_pair(statistics, pair, widths[one], settings.correspondences)
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
        if bool(weights.any()):
            statistics.add_soft_pairs(rows / scale, columns / scale, weights)
        return
    rows, columns = corresponding_patches(here, there)
    if len(rows):
        statistics.add_pairs(rows / scale, columns / scale)
