"""The measures of the paper's Figure 1: distances within and between videos, cycles, rank.

Frames and definitions are those of the released ``cal_metric`` code (Co-Settle, arXiv:2603.26597)
on a CPU, but for patch tokens only: the released code compares different sets of tokens before and
after the projection. Cycle consistency is this package's own measure.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.drift import cycle_consistent, nearest, token_frames
from cosettle_adapter.evaluation.run import mean
from cosettle_adapter.evaluation.spectra import Spectrum, SpectrumStatistics, eigen
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    FeatureVariant,
    encode_variants,
    feature_variants,
    raw_same,
)
from cosettle_adapter.evaluation.videos import each_readable, frames_of
from cosettle_adapter.video import open_frames
from cosettle_adapter.video.geometry import resize

_PERCENTILE = 95  # of the distance from the mean patch; twice that is a diameter
_POSITIONS = 8  # patches of a frame that D_inter compares
_SEED = 42  # of these positions, as in the released code
_TIMES = ((0.25, 0.4), (0.35, 0.5), (0.45, 0.6), (0.55, 0.7), (0.65, 0.8))  # of cycles, relative
_TEMPERATURE = 0.03  # of the steps of a cycle
_THUMBNAIL = 256  # pixels; largest side of a thumbnail
_MARGIN = 256 / 224  # shorter side of a frame over the side of its central square
_FAILURES = 6  # number of worst moments kept


@dataclasses.dataclass(frozen=True)
class RepresentationSettings:
    """How videos are read and measured; the defaults follow the released code.

    Attributes:
        frames: maximum number of frames per video, from its beginning.
        rate: approximate number of frames per second; image folders are read in full. The default
            is that of the released code, 40 frames in 10 seconds.
        size: side of the central square, which is cut from frames whose shorter side is resized to
            256 / 224 of it; rounded to whole patches.
        gap: frames between the two ends of a cycle whose consistency is measured.
        trim: frames at both ends of a video that D_intra leaves out.
    """

    frames: int = 40
    rate: float = 4.0
    size: int = 224
    gap: int = 6
    trim: int = 3


class VideoRepresentation(NamedTuple):
    """Figures of one video; see :class:`RepresentationMetrics`."""

    name: str
    frames: int
    d_intra: float
    d_inter: float
    cycle_accuracy: float
    cycle_consistency: float


class Representation(NamedTuple):
    """Means over videos without NaN, and the videos in the order they were added."""

    videos: tuple[VideoRepresentation, ...]
    d_intra: float
    d_inter: float
    effective_rank: float
    cycle_accuracy: float
    cycle_consistency: float

    @property
    def figures(self) -> dict[str, float]:
        """Figures for tables; the margin is large if videos are distant and their frames close."""
        return {
            "D_intra": self.d_intra,
            "D_inter": self.d_inter,
            "margin D": self.d_inter - self.d_intra,
            "effective rank": self.effective_rank,
            "cycle accuracy": self.cycle_accuracy,
            "cycle consistency": self.cycle_consistency,
        }


class RepresentationMetrics:
    """Measures videos one by one, in little memory.

    * **D_intra**: Euclidean distance from a patch to the nearest patch in the next frame. The mean
      is over the closest half of the patches of every pair of frames, without ``trim`` frames at
      both ends, in diameters of the video: twice the 95th percentile (linear between ranks) of the
      distance of all its patches from their mean. NaN if all patches are equal.
    * **D_inter**: Euclidean distance between the middle frames ``T // 2`` of two videos at one
      position of the grid. The mean is over 8 fixed random positions and all pairs of videos, in
      diameters of those patches (percentile of the nearest lower rank). NaN for a single video.
    * **Effective rank**: of the patches of all middle frames, ``(N, C)`` and not centred: the
      exponential of the entropy of the singular values, normalised to sum 1, over min(N, C).
    * **Cycle accuracy**: share of windows of 2 x 2 patches to which a random walk to another frame
      and back most probably returns. A step is the softmax of inner products of the windows' means
      (not normalised) over 0.03. The mean is over five pairs of frames: at 25 and 40 % of the
      video, and each next one 10 % later.
    * **Cycle consistency**: share of patches that are cycle-consistent over ``gap`` frames
      (:func:`~cosettle_adapter.evaluation.drift.cycle_consistent`).
    """

    def __init__(self, *, gap: int = 1, trim: int = 0) -> None:
        if gap < 1 or trim < 0:
            raise ValueError(f"got gap={gap} and trim={trim}, expected gap >= 1 and trim >= 0")
        self.gap, self.trim = gap, trim
        self.at_least = max(2 * trim + 2, gap + 1)  # frames of a video
        self._rows: list[VideoRepresentation] = []
        self._samples: list[Tensor] = []
        self._shape: tuple[int, ...] = ()
        self._gram = torch.empty(0)

    def check(self, features: Tensor) -> Tensor:
        """Check that features can be measured with the earlier ones; return ``(T, h w, C)``."""
        frames, shape = token_frames(features, at_least=self.at_least), tuple(features.shape[1:])
        if self._shape not in ((), shape):
            raise GeometryError(
                f"got features (C, h, w) = {shape} after a video of {self._shape}; videos are "
                "compared at equal positions, so resize all frames to one size=(height, width)"
            )
        if not bool(frames.isfinite().all()):
            raise FrameError("the features hold values that are not finite")
        return frames

    @torch.no_grad()
    def add(self, features: Tensor, *, name: str = "") -> Tensor:
        """Measure a video ``(T, C, h, w)``; return cycle consistency ``(T - gap, h, w)`` bool."""
        frames = self.check(features)
        length, patches, width = frames.shape
        if not self._shape:
            self._shape = tuple(features.shape[1:])
            self._gram = torch.zeros(width, width, dtype=torch.float64)
        centred = frames - frames.mean(dim=(0, 1))
        steps = _steps(centred[self.trim : length - self.trim])
        closest = steps.sort(dim=1).values[:, : max(1, patches // 2)].double()
        d_intra = float(closest.mean()) / _diameter(centred, "linear")
        middle = frames[length // 2].to("cpu", torch.float64)
        self._gram += middle.T @ middle
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(_SEED))
        self._samples.append(middle[order[:_POSITIONS]])
        consistent = cycle_consistent(features, gap=self.gap)
        share = float(consistent.float().mean())
        maps = rearrange(frames, "t (h w) c -> t c h w", w=features.shape[-1])
        accuracy = _cycle_accuracy(maps)
        self._rows.append(VideoRepresentation(name, length, d_intra, math.nan, accuracy, share))
        return consistent

    @torch.no_grad()
    def result(self) -> Representation:
        """Return the figures of the videos so far, at least one; more may be added afterwards."""
        samples = torch.stack(self._samples)
        centred = samples - samples.mean(dim=(0, 1))
        by_position = rearrange(centred, "v s c -> s v c")
        sums = torch.stack([torch.cdist(at, at).sum(dim=1) for at in by_position]).sum(dim=0)
        others = len(by_position) * (len(samples) - 1) or math.nan
        d_inter = (sums / others / _diameter(centred, "lower")).tolist()
        rows = [row._replace(d_inter=d) for row, d in zip(self._rows, d_inter, strict=True)]
        most = min(len(rows) * math.prod(self._shape[1:]), len(self._gram))
        singular = eigen(self._gram)[0][:most].sqrt()
        rank = float(torch.special.entr(singular / singular.sum()).sum().exp()) / most
        return Representation(
            videos=tuple(rows),
            d_intra=mean(row.d_intra for row in rows),
            d_inter=mean(d_inter),
            effective_rank=rank,
            cycle_accuracy=mean(row.cycle_accuracy for row in rows),
            cycle_consistency=mean(row.cycle_consistency for row in rows),
        )


class WorstMoment(NamedTuple):
    """The two frames of a video between which the fewest patches are cycle-consistent."""

    video: str
    when: str
    frames: Tensor  # (2, 3, H, W) uint8 thumbnails
    consistent: Tensor  # (h, w) bool, which patches of the first frame are cycle-consistent
    cycle_consistency: float


class RepresentationReport(NamedTuple):
    """Results of :func:`evaluate_representation`, by variant of features.

    ``spectrum`` is that of the tokens the projection reads, None without a projection, for a
    single video or without motion; ``failures`` are the worst moments of the adapted features (raw
    ones without a projection), worst first; ``skipped`` maps unusable videos to the reasons.
    """

    results: Mapping[str, Representation]
    spectrum: Spectrum | None
    failures: Sequence[WorstMoment]
    skipped: Mapping[str, str]


def evaluate_representation(
    adapter: CoSettleAdapter,
    videos: Sequence[str | Path],
    settings: RepresentationSettings | None = None,
    *,
    batch_size: int = 8,
    variants: Sequence[FeatureVariant] | None = None,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> RepresentationReport:
    """Measure the features of videos as in the paper's Figure 1, one video at a time.

    ``videos`` are files or folders of images. Of the variants that need a whole clip only the
    centred features are measured. ``on_video`` is called with the number of videos done and the
    number of all.
    """
    settings = settings or RepresentationSettings()
    variants = variants or feature_variants(adapter)
    variants = [v for v in variants if not v.needs_clip or v.name == CENTRED]
    metrics = {
        variant.name: RepresentationMetrics(gap=settings.gap, trim=settings.trim)
        for variant in variants
    }
    statistics = SpectrumStatistics()
    worst: list[WorstMoment] = []
    paths = list(dict.fromkeys(map(Path, videos)))
    count = Counter(path.name for path in paths)
    by_name = {path.name if count[path.name] == 1 else str(path): path for path in paths}

    def measure(name: str) -> None:
        path = by_name[name]
        select = dataclasses.replace(
            frames_of(path, rate=settings.rate), max_frames=settings.frames
        )
        times, thumbnails = [], []

        def batches() -> Iterator[Tensor]:
            for chunk in open_frames(path, select, chunk_size=batch_size):
                square = _central_square(chunk.frames, settings.size)
                side = min(_THUMBNAIL, square.shape[-1])
                thumbnails.append(resize(square, (side, side)).round().to(torch.uint8))
                times.extend(chunk.timestamps.tolist())
                yield square

        encoded = encode_variants(adapter, batches(), variants, size=settings.size)
        features = {name: maps.cpu() for name, maps in encoded}
        needed = metrics[variants[0].name].at_least
        if len(times) < needed:
            raise FrameError(
                f"got {len(times)} frames at {settings.rate:g} per second, expected at least "
                f"{needed}; increase rate, or decrease gap or trim"
            )
        for variant, maps in features.items():  # all checks come before the first is added
            metrics[variant].check(maps)
        cycles = {
            variant: metrics[variant].add(maps, name=name) for variant, maps in features.items()
        }
        statistics.add(raw_same(features))
        consistent = cycles[ADAPTED] if ADAPTED in cycles else raw_same(cycles)
        shares = reduce(consistent.double(), "t h w -> t", "mean")
        lowest = int(shares.argmin())
        pair = [lowest, lowest + settings.gap]
        first, second = (times[index] for index in pair)
        when = f"{first:.2f} s to {second:.2f} s"
        if path.is_dir():  # images have positions, not times
            when = f"frame {first:g} to {second:g}"
        frames, share = torch.cat(thumbnails)[pair], float(shares[lowest])
        worst.append(WorstMoment(name, when, frames, consistent[lowest], share))
        worst.sort(key=lambda moment: moment.cycle_consistency)
        del worst[_FAILURES:]

    _, skipped = each_readable(list(by_name), measure, on_video)
    spectrum = None
    if statistics.enough and ADAPTED in metrics:
        spectrum = statistics.spectrum(adapter.projection.project)
    results = {variant: metric.result() for variant, metric in metrics.items()}
    return RepresentationReport(results, spectrum, worst, skipped)


def _central_square(frames: Tensor, size: int) -> Tensor:
    """Resize frames ``(N, 3, H, W)`` uint8 as PIL does (bilinear), and crop the central square.

    Values may differ from PIL's by 1, because torch rounds the weights to fewer bits.
    """
    short, smaller = round(size * _MARGIN), min(frames.shape[-2:])
    sides = [short * side // smaller for side in frames.shape[-2:]]
    resized = F.interpolate(frames, sides, mode="bilinear", antialias=True)
    top, left = (round((side - size) / 2) for side in sides)
    return resized[..., top : top + size, left : left + size]


def _cycle_accuracy(features: Tensor) -> float:
    """Return the cycle accuracy of a video of features ``(T, C, h, w)``."""
    pairs = (torch.tensor(_TIMES) * len(features)).long()
    windows = F.avg_pool2d(features, [min(2, side) for side in features.shape[2:]])
    here, there = (rearrange(windows[frames], "p c h w -> p (h w) c") for frames in pairs.T)
    similar = here @ there.mT / _TEMPERATURE
    cycles = similar.softmax(dim=2) @ similar.mT.softmax(dim=2)
    own = torch.arange(cycles.shape[1], device=cycles.device)
    return float((cycles.argmax(dim=2) == own).double().mean())


def _diameter(centred: Tensor, percentile: Literal["linear", "lower"]) -> float:
    """Return twice the 95th percentile of the length of patches ``(..., C)``; NaN if all are 0."""
    radius = centred.norm(dim=-1).double().flatten().cpu().numpy()
    if percentile == "lower":  # the farthest of the closest 95 %
        within = max(1, len(radius) * _PERCENTILE // 100)
        return 2 * float(np.sort(radius)[within - 1]) or math.nan
    return 2 * float(np.percentile(radius, _PERCENTILE)) or math.nan


def _steps(frames: Tensor) -> Tensor:
    """Distances ``(T - 1, N)`` of patches, centred for precision, to the nearest one next."""
    distances = []
    for here, there in pairwise(frames):
        closest = nearest(here, there, there.square().sum(dim=-1) / 2)
        # not from the matrix product, whose rounding would make equal patches distant
        distances.append((here - there[closest]).norm(dim=-1))
    return torch.stack(distances)
