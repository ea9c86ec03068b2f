"""The paper's Figure 1 in numbers: how close a video's frames stay, how far apart videos are.

Definitions are those of the released ``cal_metric`` code (Co-Settle, arXiv:2603.26597), taken on
patch tokens alone whatever the backbone: the released code compares different token sets before
and after the projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.consistency import cycle_accuracy, token_frames

_CHUNK = 1024  # patches compared at a time
_POSITIONS = 8  # patches of a frame that D_inter compares
_ROWS = 64  # videos compared with all others at a time


@dataclass(frozen=True)
class VideoRepresentation:
    """What was measured on one video; see :class:`Representation`."""

    name: str
    frames: int
    d_intra: Mapping[float, float]
    d_intra_raw: float
    d_inter: Mapping[float, float]
    cycle_accuracy: float


@dataclass(frozen=True)
class Representation:
    """Means over videos, and the videos.

    Attributes:
        videos: a row for each video, in the order they were added.
        d_intra: percentile to D_intra in diameters; NaN for a video whose patches are all equal,
            which the mean leaves out.
        d_intra_raw: D_intra in the features' own units.
        d_inter: percentile to D_inter in diameters; NaN with a single video.
        d_inter_raw: D_inter in the features' own units.
        effective_rank: in (0, 1], a share of the most there could be.
        cycle_accuracy: in [0, 1].
    """

    videos: tuple[VideoRepresentation, ...]
    d_intra: Mapping[float, float]
    d_intra_raw: float
    d_inter: Mapping[float, float]
    d_inter_raw: float
    effective_rank: float
    cycle_accuracy: float

    def margin(self, *, gamma: float = 1.0, percentile: float = 95.0) -> float:
        """Return D = D_inter - gamma * D_intra, both normalised at ``percentile``."""
        if percentile not in self.d_inter:
            known = ", ".join(f"{measured:g}" for measured in self.d_inter)
            raise ValueError(f"got percentile={percentile:g}, but measured were {known}")
        return self.d_inter[percentile] - gamma * self.d_intra[percentile]


class RepresentationMetrics:
    """Collects the representation metrics video by video.

    A video leaves behind a row of figures and the 8 patches that D_inter compares with those of
    all other videos; nothing else grows with the number or the length of videos.

    * **D_intra**: Euclidean distance from every patch to its nearest patch in the next frame; of
      every pair of frames the closest half counts. Mean over patches, pairs,
      videos. In diameters of the video: twice the percentile (linear between ranks) of the
      distance of all its patches from their mean.
    * **D_inter**: the middle frame ``T // 2`` of every video at 8 fixed random positions of the
      grid; Euclidean distance at equal positions, mean over positions and pairs of videos. In
      diameters of those patches.
    * **Effective rank**: of the patches of all middle frames, ``(N, C)`` and not centred: the
      exponential of the entropy of the singular values, normalised to sum 1, over min(N, C).
    * **Cycle accuracy**: :func:`~cosettle_adapter.evaluation.consistency.cycle_accuracy`, mean
      over videos.
    """

    def __init__(
        self,
        *,
        percentiles: Sequence[float] = (90.0, 95.0, 100.0),
        gap: int = 1,
        trim: int = 0,
        seed: int = 42,
    ) -> None:
        """Begin with no videos.

        Args:
            percentiles: percentiles of the radius.
            gap: frames between the two ends of a cycle, at least 1.
            trim: frames left out of D_intra at both ends of a video; the released code leaves
                out 3. The diameter takes them all.
            seed: of the positions; with 42 they are those of the released code.
        """
        if gap < 1 or trim < 0:
            raise ValueError(f"got gap={gap} and trim={trim}, expected gap >= 1 and trim >= 0")
        self.percentiles = tuple(float(percentile) for percentile in percentiles)
        self.gap, self.trim, self.seed = gap, trim, seed
        self._gram = torch.empty(0)
        self._rows: list[VideoRepresentation] = []
        self._samples: list[Tensor] = []
        self._shape: tuple[int, ...] | None = None

    @torch.no_grad()
    def add(self, features: Tensor, *, name: str = "") -> None:
        """Measure one video; by default it is called by its number.

        Args:
            features: ``(T, C, h, w)`` floats, patch tokens of consecutive frames; the same
                ``(C, h, w)`` for all videos.
            name: what to call it.

        Raises:
            GeometryError: features that are not floats of the first video's ``(C, h, w)``.
            FrameError: too few frames, or values that are not finite; the video is not added.
        """
        frames = token_frames(features, at_least=max(2 * self.trim + 2, self.gap + 1))
        check_same_shape(self._shape, features)
        name = name or f"video {len(self._rows)}"
        if not bool(frames.isfinite().all()):
            raise FrameError(f"the features of {name} hold values that are not finite")
        length, patches, width = frames.shape
        if self._shape is None:
            self._shape = tuple(features.shape[1:])
            self._gram = torch.zeros(width, width, dtype=torch.float64)
        centred = frames - frames.mean(dim=(0, 1))
        steps = distances_to_next(centred[self.trim : length - self.trim])
        distance = float(steps.sort(dim=1).values[:, : max(1, patches // 2)].double().mean())
        middle = frames[length // 2].to("cpu", torch.float64)
        self._gram += middle.T @ middle
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(self.seed))
        self._samples.append(middle[order[:_POSITIONS]])
        shares, cycles = self._shares(distance, centred), cycle_accuracy(features, gap=self.gap)
        self._rows.append(VideoRepresentation(name, length, shares, distance, {}, cycles))

    @torch.no_grad()
    def result(self) -> Representation:
        """Return the figures of the videos so far; more may be added afterwards.

        Raises:
            FrameError: no video was added.
        """
        if self._shape is None:
            raise FrameError("no video was added, so there is nothing to measure; call add first")
        samples = torch.stack(self._samples)
        samples = samples - samples.mean(dim=(0, 1))
        distances = mean_distances(samples).tolist()
        rows = tuple(
            replace(row, d_inter=self._shares(distance, samples))
            for row, distance in zip(self._rows, distances, strict=True)
        )
        tokens = len(rows) * self._shape[1] * self._shape[2]
        return Representation(
            videos=rows,
            d_intra={p: _mean([row.d_intra[p] for row in rows]) for p in self.percentiles},
            d_intra_raw=_mean([row.d_intra_raw for row in rows]),
            d_inter=self._shares(_mean(distances), samples),
            d_inter_raw=_mean(distances),
            effective_rank=effective_rank(self._gram, tokens),
            cycle_accuracy=_mean([row.cycle_accuracy for row in rows]),
        )

    def _shares(self, distance: float, centred: Tensor) -> dict[float, float]:
        """Percentile to a distance in diameters of centred patches ``(..., C)``."""
        radius = centred.norm(dim=-1).double().flatten().cpu().numpy()
        diameters = (2 * np.percentile(radius, self.percentiles)).tolist()
        shares = [distance / diameter if diameter > 0 else math.nan for diameter in diameters]
        return dict(zip(self.percentiles, shares, strict=True))


def check_same_shape(expected: tuple[int, ...] | None, features: Tensor) -> None:
    """Refuse features ``(T, C, h, w)`` of another ``(C, h, w)`` than the first video's."""
    if expected not in (None, shape := tuple(features.shape[1:])):
        raise GeometryError(
            f"got features (C, h, w) = {shape} after a video of {expected}; videos are compared at "
            "equal positions, so resize all frames to one size=(height, width)"
        )


def distances_to_next(frames: Tensor) -> Tensor:
    """Return the Euclidean distance ``(T - 1, N)`` of every patch to its nearest one a frame on.

    ``frames`` are ``(T, N, C)`` and centred: a large common offset would cost digits.
    """
    distances = []
    for here, there in pairwise(frames):
        offsets = there.square().sum(dim=-1) / 2
        nearest = [(part @ there.T - offsets).argmax(dim=1) for part in torch.split(here, _CHUNK)]
        # measured anew: a distance read off the matrix product is far from 0 for equal patches
        distances.append((here - there[torch.cat(nearest)]).norm(dim=-1))
    return torch.stack(distances)


def mean_distances(samples: Tensor) -> Tensor:
    """Return the mean distance of each of ``(V, S, C)`` to all others, ``(V,)``; NaN for one."""
    videos, positions, _ = samples.shape
    everyone = rearrange(samples, "v s c -> s v c")
    sums = [
        reduce(torch.cdist(part, everyone), "s v u -> v", "sum")
        for part in torch.split(everyone, _ROWS, dim=1)
    ]
    return torch.cat(sums) / (positions * (videos - 1) or math.nan)


def effective_rank(gram: Tensor, tokens: int) -> float:
    """Return the effective rank of a matrix ``(tokens, C)`` of inner products ``(C, C)``."""
    most = min(tokens, len(gram))
    squared = torch.linalg.eigvalsh(gram)[-most:]
    # rounding leaves something of singular values that are zero
    noise = squared[-1].clamp_min(0) * len(gram) * torch.finfo(gram.dtype).eps
    singular = squared[squared > noise].sqrt()
    if not len(singular):
        return math.nan
    shares = singular / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) / most


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
