"""The paper's Figure 1 in numbers: what stays together within a video, what stays apart between.

Definitions are those of the released ``cal_metric`` code (Co-Settle, arXiv:2603.26597), taken on
patch tokens alone whatever the backbone: the released code compares different token sets before
and after the projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.analysis.consistency import cycle_accuracy
from cosettle_adapter.analysis.dispersion import effective_rank, mean_distances, percentile_of
from cosettle_adapter.analysis.tokens import distances_to_next, token_frames
from cosettle_adapter.errors import FrameError, GeometryError


@dataclass(frozen=True)
class VideoRepresentation:
    """What was measured on one video.

    Attributes:
        name: as it was added.
        frames: number of frames.
        d_intra: percentile to distance to the next frame, as a share of the video's diameter;
            NaN where all its patches are equal.
        d_intra_raw: that distance in the features' own units.
        d_inter: percentile to mean distance to all other videos, as a share of the global
            diameter; NaN for a video alone.
        cycle_accuracy: share of cells that come home, in [0, 1].
    """

    name: str
    frames: int
    d_intra: Mapping[float, float]
    d_intra_raw: float
    d_inter: Mapping[float, float]
    cycle_accuracy: float


@dataclass(frozen=True)
class Representation:
    """What :meth:`RepresentationMetrics.result` returns: means over videos, and the videos.

    Attributes:
        videos: a row for each video, in the order they were added.
        d_intra: percentile to normalised D_intra; videos without a diameter are left out.
        d_intra_raw: D_intra in the features' own units.
        d_inter: percentile to normalised D_inter; NaN with a single video.
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
        for measured in self.d_inter:
            if measured == percentile:
                return self.d_inter[measured] - gamma * self.d_intra[measured]
        known = ", ".join(f"{measured:g}" for measured in self.d_inter)
        raise ValueError(f"got percentile={percentile:g}, but measured were {known}")


class RepresentationMetrics:
    """Gathers the representation metrics video by video.

    A video leaves behind a row of figures and the ``positions x C`` patches that D_inter compares
    with those of all other videos (12 kB at C = 384); the effective rank needs one ``C x C``
    matrix in all. Nothing else grows with the number or the length of videos.

    * **D_intra**: Euclidean distance from every patch to its nearest patch in the next frame; of
      every pair of frames the closest ``floor(keep * patches)`` count. Mean over patches, pairs,
      videos. In diameters of the video: twice the percentile (linear between ranks) of the
      distance of all its patches from their mean.
    * **D_inter**: the middle frame ``T // 2`` of every video at fixed random positions of the
      grid; Euclidean distance at equal positions, mean over positions and pairs of videos. In
      diameters of those patches.
    * **Effective rank**: of the patches of all middle frames, ``(N, C)`` and not centred: the
      exponential of the entropy of the singular values, normalised to sum 1, over min(N, C).
    * **Cycle accuracy**: :func:`~cosettle_adapter.analysis.cycle_accuracy`, mean over videos.

    Example:
        >>> metrics = RepresentationMetrics()
        >>> for seed in range(3):
        ...     metrics.add(torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed)))
        >>> len(metrics.result().videos)
        3
    """

    def __init__(
        self,
        *,
        keep: float = 0.5,
        percentiles: Sequence[float] = (90.0, 95.0, 100.0),
        positions: int = 8,
        seed: int = 42,
        gap: int = 1,
        trim: int = 0,
        chunk: int = 1024,
    ) -> None:
        """Begin with no videos.

        Args:
            keep: share of the patches of a pair of frames that D_intra counts, in (0, 1].
            percentiles: percentiles of the radius, each in (0, 100].
            positions: patches a frame that D_inter compares; all of them on smaller grids.
            seed: of the positions; with 42 they are those of the released code.
            gap: frames between the two ends of a cycle.
            trim: frames left out of D_intra at both ends of a video; the released code leaves
                out 3. The diameter takes them all.
            chunk: patches compared at a time; bounds memory, does not change the result.

        Raises:
            ValueError: an option out of range.
        """
        if not (0 < keep <= 1 and positions >= 1 and gap >= 1 and trim >= 0 and chunk >= 1):
            raise ValueError(
                f"got keep={keep}, positions={positions}, gap={gap}, trim={trim}, chunk={chunk}; "
                "expected keep in (0, 1], trim of at least 0 and the others of at least 1"
            )
        if not percentiles or not all(0 < percentile <= 100 for percentile in percentiles):
            raise ValueError(f"got percentiles={tuple(percentiles)}, expected some in (0, 100]")
        self.keep, self.gap, self.trim, self.chunk = keep, gap, trim, chunk
        self.percentiles = tuple(float(percentile) for percentile in percentiles)
        self._count, self._seed = positions, seed
        self._shape: tuple[int, ...] | None = None
        self._positions = torch.empty(0, dtype=torch.long)
        self._gram = torch.empty(0)
        self._tokens = 0
        self._samples: list[Tensor] = []
        self._rows: list[VideoRepresentation] = []

    @property
    def shortest(self) -> int:
        """Frames that a video must have."""
        return max(2 * self.trim + 2, self.gap + 1)

    @torch.no_grad()
    def add(self, features: Tensor, *, name: str = "") -> None:
        """Measure one video.

        Args:
            features: ``(T, C, h, w)`` floats, patch tokens of consecutive frames; the same
                ``(C, h, w)`` for all videos, or there are no equal positions.
            name: what to call it; by default its number.

        Raises:
            GeometryError: features that are not ``(T, C, h, w)`` floats, or of another shape
                than the first video's.
            FrameError: too few frames, or values that are not finite; the video is not added.
        """
        frames = token_frames(features, at_least=self.shortest)
        shape = tuple(features.shape[1:])
        if self._shape not in (None, shape):
            raise GeometryError(
                f"got features (C, h, w) = {shape} after a video of {self._shape}; videos are "
                "compared at equal positions, so resize all frames to one size=(height, width)"
            )
        name = name or f"video {len(self._rows)}"
        if not bool(frames.isfinite().all()):
            raise FrameError(f"the features of {name} hold values that are not finite")
        if self._shape is None:
            self._begin(shape)
        centred = frames - frames.mean(dim=(0, 1))
        inner = centred[self.trim : len(centred) - self.trim]
        kept = max(1, math.floor(self.keep * frames.shape[1]))
        nearest = distances_to_next(inner, self.chunk).sort(dim=1).values[:, :kept]
        distance = float(nearest.double().mean())
        diameters = self._diameters(rearrange(centred, "t n c -> (t n) c"))
        middle = frames[len(frames) // 2].to("cpu", torch.float64)
        self._gram += middle.T @ middle
        self._tokens += len(middle)
        self._samples.append(middle[self._positions])
        self._rows.append(
            VideoRepresentation(
                name=name,
                frames=len(frames),
                d_intra={p: _share(distance, diameter) for p, diameter in diameters.items()},
                d_intra_raw=distance,
                d_inter={},
                cycle_accuracy=cycle_accuracy(features, gap=self.gap),
            )
        )

    @torch.no_grad()
    def result(self) -> Representation:
        """Return the figures of the videos so far; more may be added afterwards.

        Raises:
            FrameError: no video was added.
        """
        if not self._rows:
            raise FrameError("no video was added, so there is nothing to measure; call add first")
        samples = torch.stack(self._samples)
        samples = samples - samples.mean(dim=(0, 1))
        distances = mean_distances(samples)
        diameters = self._diameters(rearrange(samples, "v s c -> (v s) c"))
        rows = tuple(
            VideoRepresentation(
                **{
                    **vars(row),
                    "d_inter": {p: _share(distance, size) for p, size in diameters.items()},
                }
            )
            for row, distance in zip(self._rows, distances.tolist(), strict=True)
        )
        d_inter = float(distances.mean())
        return Representation(
            videos=rows,
            d_intra={p: _mean([row.d_intra[p] for row in rows]) for p in self.percentiles},
            d_intra_raw=_mean([row.d_intra_raw for row in rows]),
            d_inter={p: _share(d_inter, diameter) for p, diameter in diameters.items()},
            d_inter_raw=d_inter,
            effective_rank=effective_rank(self._gram, self._tokens),
            cycle_accuracy=_mean([row.cycle_accuracy for row in rows]),
        )

    def _begin(self, shape: tuple[int, ...]) -> None:
        width, cells = shape[0], shape[1] * shape[2]
        generator = torch.Generator().manual_seed(self._seed)
        self._positions = torch.randperm(cells, generator=generator)[: self._count]
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._shape = shape

    def _diameters(self, centred: Tensor) -> dict[float, float]:
        """Percentile to twice the radius of centred patches ``(N, C)``."""
        radius = centred.norm(dim=-1).double().sort().values
        return {p: 2 * percentile_of(radius, p) for p in self.percentiles}


def _share(distance: float, diameter: float) -> float:
    return distance / diameter if diameter > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
