"""One pass over unlabelled clips: the statistics of sets of blocks, in one process or several."""

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
    StatisticsError,
    TokenStatistics,
    block_scale,
    corresponding_patches,
    soft_correspondences,
)
from cosettle_adapter.closed_form.statistics import exact
from cosettle_adapter.errors import CosettleError
from cosettle_adapter.training.candidates import Blocks
from cosettle_adapter.training.clips import neighbouring_frames

logger = logging.getLogger(__name__)

Correspondences = Literal["hard", "soft"]
_SHARDS_PER_WORKER = 4
_PAIRS_AT_ONCE = 4  # in the encoder


@dataclasses.dataclass(frozen=True)
class Gathering:
    """What is gathered, and from which frames.

    Attributes:
        sets: sets of blocks.
        size: shorter side of the frames in pixels.
        pairs: pairs of frames from each clip at each gap.
        gaps: frames between the two of a pair.
        correspondences: mutual nearest neighbours, or all pairs of patches by weight.
        leakage: encode every frame a second time with perturbed positions.
        seed: of the perturbed positions.
    """

    sets: tuple[Blocks, ...]
    size: int = 280
    pairs: int = 4
    gaps: tuple[int, ...] = (3,)
    correspondences: Correspondences = "hard"
    leakage: bool = False
    seed: int = 0


@dataclasses.dataclass
class Gathered:
    """What a pass found.

    Attributes:
        statistics: of each set of blocks.
        skipped: clips that could not be read to their end, and why.
    """

    statistics: dict[Blocks, TokenStatistics]
    skipped: dict[Path, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def nothing(cls, backbone: Backbone, sets: Sequence[Blocks]) -> Gathered:
        """Return empty statistics."""
        widths = {blocks: sum(backbone.widths[block] for block in blocks) for blocks in sets}
        return cls({blocks: TokenStatistics(width) for blocks, width in widths.items()})

    def merge(self, other: Gathered) -> None:
        """Add what another pass found in other clips."""
        for blocks, statistics in other.statistics.items():
            self.statistics[blocks].merge(statistics)
        self.skipped |= other.skipped

    def to_bytes(self) -> bytes:
        """Return the statistics as a safetensors file; what was skipped is not in it."""
        return save(
            {
                f"{'+'.join(map(str, blocks))}/{name}": tensor
                for blocks, statistics in self.statistics.items()
                for name, tensor in statistics.to_tensors().items()
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Gathered:
        """Read what :meth:`to_bytes` returned."""
        parts: dict[Blocks, dict[str, Tensor]] = {}
        for key, tensor in load(content).items():
            blocks, _, name = key.partition("/")
            parts.setdefault(tuple(map(int, blocks.split("+"))), {})[name] = tensor
        return cls({blocks: TokenStatistics.from_tensors(part) for blocks, part in parts.items()})


def gather(
    backbone: Backbone,
    clips: Sequence[Path],
    gathering: Gathering,
    *,
    workers: int = 1,
    on_clips: Callable[[int], None] = lambda count: None,
) -> Gathered:
    """Gather statistics in one pass over clips.

    Args:
        backbone: the frozen encoder.
        clips: video files.
        gathering: see :class:`Gathering`.
        workers: processes that share the clips, each with a copy of the encoder; the statistics
            are the same, up to rounding in float64.
        on_clips: called with the number of clips that were done since the last call.

    Raises:
        ValueError: workers below 1, or several for an encoder that is not on the CPU.
        StatisticsError: a worker ended.
    """
    if workers < 1 or (workers > 1 and backbone.device.type != "cpu"):
        raise ValueError(
            f"got {workers} workers for a backbone on {backbone.device}; several processes are "
            "for the CPU, and one is enough for any other device"
        )
    if workers > 1:
        return _gather_together(backbone, clips, gathering, workers, on_clips)
    found = Gathered.nothing(backbone, gathering.sets)
    adapter = CoSettleAdapter.raw(backbone)
    for clip in clips:
        try:
            for frames in _batches(clip, gathering):
                _add(found, adapter, frames, gathering, clip)
        except (CosettleError, OSError) as error:
            logger.warning("skipped %s: %s", clip, error)
            found.skipped[clip] = str(error)
        for statistics in found.statistics.values():
            statistics.end_clip()
        on_clips(1)
    return found


def _batches(clip: Path, gathering: Gathering) -> Iterator[Tensor]:
    """Frames ``(2 P, 3, H, W)`` of a few pairs at a time; those read before an error come first."""
    for gap in gathering.gaps:
        together: list[Tensor] = []
        try:
            for pair in neighbouring_frames(clip, pairs=gathering.pairs, gap=gap):
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
    """Sums over tokens of single blocks, made once for all sets that the blocks are in."""

    def __init__(self, tokens: Mapping[int, Tensor]) -> None:
        self._tokens = {
            block: exact(rearrange(each, "t c h w -> (t h w) c")) for block, each in tokens.items()
        }
        self._products: dict[tuple[int, int], Tensor] = {}

    def of(self, blocks: Blocks) -> tuple[int, Tensor, Tensor]:
        """What :meth:`TokenStatistics.add_moments` takes, of concatenated blocks."""
        tokens = [self._tokens[block] for block in blocks]
        outer = [torch.cat([self._outer(a, b) for b in blocks], dim=1) for a in blocks]
        return len(tokens[0]), torch.cat([each.sum(0) for each in tokens]), torch.cat(outer)

    def _outer(self, first: int, second: int) -> Tensor:
        if (second, first) not in self._products:
            self._products[second, first] = self._tokens[second].T @ self._tokens[first]
            self._products[first, second] = self._products[second, first].T
        return self._products[first, second]


def _add(
    found: Gathered, adapter: CoSettleAdapter, frames: Tensor, gathering: Gathering, clip: Path
) -> None:
    """Encode pairs of frames once, for all sets of blocks."""
    backbone = adapter.backbone
    images = adapter.preprocess(frames, size=gathering.size)
    layers = sorted({block for blocks in gathering.sets for block in blocks})
    maps = backbone.intermediate_tokens(images, layers, norm=False)
    tokens = dict(zip(layers, (each.float() for each in maps), strict=True))
    hidden: dict[int, Tensor] = {}
    if gathering.leakage:
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        # by the clip's name, so that it does not matter which process has it
        seed = zlib.crc32(f"{gathering.seed} {clip.name}".encode())
        offsets = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed))
        offsets = repeat(offsets, "two yx -> (pairs two) yx", pairs=len(frames) // 2)
        positions = backbone.perturbed_positions(grid, offsets)
        maps = backbone.intermediate_tokens(images, layers, norm=False, positions=positions)
        hidden = dict(zip(layers, (each.float() for each in maps), strict=True))
    moments = _Moments(tokens)
    for blocks, statistics in found.statistics.items():
        widths = [backbone.widths[block] for block in blocks]
        joined = torch.cat([tokens[block] for block in blocks], dim=1)
        statistics.add_moments(*moments.of(blocks))
        for pair in rearrange(joined, "(pairs two) c h w -> pairs two c h w", two=2):
            _add_pairs(statistics, pair, widths, gathering.correspondences)
        if gathering.leakage:
            other = torch.cat([hidden[block] for block in blocks], dim=1)
            statistics.add_views(
                rearrange(joined, "t c h w -> (t h w) c"), rearrange(other, "t c h w -> (t h w) c")
            )


def _add_pairs(
    statistics: TokenStatistics, maps: Tensor, widths: Sequence[int], how: Correspondences
) -> None:
    """Match two frames; of several blocks, each counts alike."""
    scale = maps.new_ones(maps.shape[1])
    if len(widths) > 1:
        centred = maps - reduce(maps, "t c h w -> 1 c 1 1", "mean")
        scale = block_scale(reduce(centred.square(), "t c h w -> c", "mean"), widths)
    here, there = maps * rearrange(scale, "c -> c 1 1")
    if how == "soft":
        rows, columns, weights = soft_correspondences(here, there)
        if bool(weights.any()):
            statistics.add_soft_pairs(rows / scale, columns / scale, weights)
        return
    rows, columns = corresponding_patches(here, there)
    if len(rows):
        statistics.add_pairs(rows / scale, columns / scale)


# --- several processes: each has the encoder, takes clips, and returns the sums it made ---

_worker: tuple[Backbone, Gathering] | None = None


def _begin(backbone: Backbone, gathering: Gathering, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = (backbone, gathering)


def _gather_shard(clips: Sequence[Path]) -> tuple[bytes, dict[Path, str], int]:
    if _worker is None:
        raise RuntimeError("the worker was not begun")
    found = gather(_worker[0], clips, _worker[1])
    return found.to_bytes(), found.skipped, len(clips)


def _gather_together(
    backbone: Backbone,
    clips: Sequence[Path],
    gathering: Gathering,
    workers: int,
    on_clips: Callable[[int], None],
) -> Gathered:
    count = min(len(clips), workers * _SHARDS_PER_WORKER)
    shards = [list(clips[index::count]) for index in range(count)]
    found = Gathered.nothing(backbone, gathering.sets)
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        initializer=_begin,
        initargs=(backbone, gathering, max(1, torch.get_num_threads() // workers)),
    )
    try:
        for content, skipped, done in pool.map(_gather_shard, shards):
            part = Gathered.from_bytes(content)
            part.skipped = skipped
            found.merge(part)
            on_clips(done)
    except BrokenProcessPool as error:
        raise StatisticsError(
            "a worker process ended before its clips were done: too little memory, or a script "
            "that calls this outside `if __name__ == '__main__':`. Use fewer workers, or one"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found
