"""One pass over unlabelled clips: the statistics of sets of layers, in one process or several."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from safetensors.torch import load, save
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.backbones import Backbone
from cosettle_adapter.closed_form import (
    Nuisance,
    StatisticsError,
    TokenStatistics,
    layer_scale,
)
from cosettle_adapter.closed_form.affine import exact
from cosettle_adapter.correspondence import corresponding_patches, soft_correspondences
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.clips import neighbouring_frames
from cosettle_adapter.training.model_selection import Layers
from cosettle_adapter.training.positions import perturbed_positions

logger = logging.getLogger(__name__)

Correspondences = Literal["hard", "soft"]

_SHARDS_PER_WORKER = 4
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
    correspondences: Correspondences = "hard"
    rendered: int = 12
    seed: int = 0


Statistics = dict[Layers, TokenStatistics]
"""Of each set of layers."""


def collect_statistics(
    backbone: Backbone,
    clips: Sequence[Path],
    sets: Sequence[Layers],
    settings: FitSettings,
    *,
    workers: int = 1,
    on_clips: Callable[[int], None] = lambda count: None,
) -> tuple[Statistics, dict[Path, str]]:
    """Collect statistics in one encoder pass over pairs of neighbouring frames.

    Args:
        backbone: the frozen encoder.
        clips: video files.
        sets: of layers.
        settings: size, pairs, gaps, correspondences and nuisance count here, and the seed.
        workers: processes that share the clips; the statistics are the same, up to rounding.
        on_clips: called with the number of clips that were done since the last call.

    Returns:
        The statistics, and the clips that could not be read to their end, with the reason.

    Raises:
        ValueError: workers below 1, or several for an encoder that is not on the CPU.
        StatisticsError: a worker ended.
    """
    if workers < 1 or (workers > 1 and backbone.device.type != "cpu"):
        raise ValueError(
            f"got {workers} workers for a backbone on {backbone.device}; several processes are "
            "for the CPU, and one is enough for any other device"
        )
    collector = _Collector(backbone, sets, settings)
    if workers == 1:
        for clip in clips:
            collector.add_clip(clip)
            on_clips(1)
    elif clips:
        collector.add_together(clips, workers, on_clips)
    return collector.statistics, collector.skipped


class _Collector:
    def __init__(self, backbone: Backbone, sets: Sequence[Layers], settings: FitSettings) -> None:
        self.backbone, self.sets, self.settings = backbone, tuple(sets), settings
        self.statistics: Statistics = {
            layers: TokenStatistics(sum(backbone.widths[layer] for layer in layers))
            for layers in sets
        }
        self.skipped: dict[Path, str] = {}

    def add_clip(self, clip: Path) -> None:
        """Encode a clip; of one that breaks off, what comes before counts."""
        adapter = CoSettleAdapter.raw(self.backbone)
        try:
            for frames in _batches(clip, self.settings):
                self._add(adapter, frames, clip)
        except (CosettleError, OSError) as error:
            logger.warning("skipped %s: %s", clip, error)
            self.skipped[clip] = str(error)
        for statistics in self.statistics.values():
            statistics.end_clip()

    def _add(self, adapter: CoSettleAdapter, frames: Tensor, clip: Path) -> None:
        """Encode pairs of frames once, for all sets of layers."""
        backbone, settings = self.backbone, self.settings
        images = adapter.preprocess(frames, size=settings.size)
        layers = sorted({layer for one in self.sets for layer in one})
        maps = backbone.intermediate_tokens(images, layers, norm=False)
        tokens = dict(zip(layers, (each.float() for each in maps), strict=True))
        hidden: dict[int, Tensor] = {}
        if settings.nuisance == "intra+positions":
            grid = (maps[0].shape[-2], maps[0].shape[-1])
            # by the clip's name, so that it does not matter which process has it
            seed = zlib.crc32(f"{settings.seed} {clip.name}".encode())
            offsets = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
            offsets = repeat(offsets, "two yx -> (pairs two) yx", pairs=len(frames) // 2)
            positions = perturbed_positions(backbone, grid, offsets)
            maps = backbone.intermediate_tokens(images, layers, norm=False, positions=positions)
            hidden = dict(zip(layers, (each.float() for each in maps), strict=True))
        moments = _Moments(tokens)
        for one, statistics in self.statistics.items():
            widths = [backbone.widths[layer] for layer in one]
            joined = torch.cat([tokens[layer] for layer in one], dim=1)
            statistics.add_moments(*moments.of(one))
            for pair in rearrange(joined, "(pairs two) c h w -> pairs two c h w", two=2):
                _add_pairs(statistics, pair, widths, settings.correspondences)
            if hidden:
                other = torch.cat([hidden[layer] for layer in one], dim=1)
                flat = (rearrange(each, "t c h w -> (t h w) c") for each in (joined, other))
                statistics.add_views(*flat)

    def add_together(
        self, clips: Sequence[Path], workers: int, on_clips: Callable[[int], None]
    ) -> None:
        """Each process has the encoder, takes clips, and returns the sums it made."""
        count = min(len(clips), workers * _SHARDS_PER_WORKER)
        pool = concurrent.futures.ProcessPoolExecutor(
            max_workers=workers,
            mp_context=multiprocessing.get_context("spawn"),  # torch's threads survive no fork
            initializer=_begin,
            initargs=(
                self.backbone, self.sets, self.settings,
                max(1, torch.get_num_threads() // workers),
            ),
        )  # fmt: skip
        try:
            for found, skipped, done in pool.map(
                _collect_shard, (list(clips[index::count]) for index in range(count))
            ):
                for layers, content in found.items():
                    self.statistics[layers].merge(TokenStatistics.from_tensors(load(content)))
                self.skipped |= skipped
                on_clips(done)
        except BrokenProcessPool as error:
            raise StatisticsError(
                "a worker process ended before its clips were done: too little memory, or a script "
                "that calls this outside `if __name__ == '__main__':`. Use fewer workers, or one"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Backbone, tuple[Layers, ...], FitSettings] | None = None


def _begin(
    backbone: Backbone, sets: tuple[Layers, ...], settings: FitSettings, threads: int
) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = (backbone, sets, settings)


def _collect_shard(
    clips: Sequence[Path],
) -> tuple[dict[Layers, bytes], dict[Path, str], int]:
    if _worker is None:
        raise RuntimeError("clips were sent to a worker before its backbone")
    backbone, sets, settings = _worker
    found, skipped = collect_statistics(backbone, clips, sets, settings)
    content = {layers: save(statistics.to_tensors()) for layers, statistics in found.items()}
    return content, skipped, len(clips)


def _batches(clip: Path, settings: FitSettings) -> Iterator[Tensor]:
    """Frames ``(2 P, 3, H, W)`` of a few pairs at a time; those read before an error come first."""
    for gap in settings.gaps:
        together: list[Tensor] = []
        try:
            for pair in neighbouring_frames(clip, pairs=settings.pairs, gap=gap):
                other_size = together and pair.shape != together[0].shape
                if other_size or len(together) == _PAIRS_AT_ONCE:
                    yield torch.cat(together)
                    together = []
                together.append(pair)
        except (CosettleError, OSError):
            if together:
                yield torch.cat(together)
            raise
        if together:
            yield torch.cat(together)


class _Moments:
    """Sums over tokens of single layers, made once for all sets that the layers are in."""

    def __init__(self, tokens: Mapping[int, Tensor]) -> None:
        self._tokens = {
            layer: exact(rearrange(each, "t c h w -> (t h w) c")) for layer, each in tokens.items()
        }
        self._products: dict[tuple[int, int], Tensor] = {}

    def of(self, layers: Layers) -> tuple[int, Tensor, Tensor]:
        """What :meth:`TokenStatistics.add_moments` takes, of concatenated layers."""
        tokens = [self._tokens[layer] for layer in layers]
        outer = [torch.cat([self._outer(a, b) for b in layers], dim=1) for a in layers]
        return len(tokens[0]), torch.cat([each.sum(0) for each in tokens]), torch.cat(outer)

    def _outer(self, first: int, second: int) -> Tensor:
        if (second, first) not in self._products:
            self._products[second, first] = self._tokens[second].T @ self._tokens[first]
            self._products[first, second] = self._products[second, first].T
        return self._products[first, second]


def _add_pairs(
    statistics: TokenStatistics, maps: Tensor, widths: Sequence[int], how: Correspondences
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
