"""Covariances of corresponding patches within and between videos, and their spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.analysis.gain import directional_gain
from cosettle_adapter.analysis.prediction import Spectrum
from cosettle_adapter.analysis.tokens import token_frames
from cosettle_adapter.closed_form import (
    StatisticsError,
    TokenStatistics,
    corresponding_patches,
)
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.evaluation.variants import RAW_LAST, RAW_SAME, compare_features

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter


class SpectrumStatistics:
    """Gathers, video by video, what a :class:`Spectrum` is made from.

    * **Intra-video covariance**: of a patch around its own mean over time, half the mean outer
      product of differences between corresponding patches. Those are mutually nearest neighbours
      (cosine, centred) of frames ``gap`` apart, so patches that change beyond recognition do not
      count, and pairs of frames without any difference say nothing.
    * **Inter-video covariance**: of the patch at one position of the grid over the middle frames
      of all videos (with the V - 1 denominator, again half the mean outer product of
      differences), mean over positions.

    Memory is ``C x C`` and ``h w x C`` in all, and a few tokens a video.
    """

    def __init__(self, *, gap: int = 1, tokens_per_video: int = 4, seed: int = 0) -> None:
        """Begin with no videos.

        Args:
            gap: frames between corresponding patches.
            tokens_per_video: tokens kept of each video, at which gains may be evaluated.
            seed: of their positions.

        Raises:
            ValueError: an option below 1.
        """
        if gap < 1 or tokens_per_video < 1:
            raise ValueError(
                f"got gap={gap} and tokens_per_video={tokens_per_video}, expected at least 1"
            )
        self.gap = gap
        self.videos = 0
        self._kept = tokens_per_video
        self._generator = torch.Generator().manual_seed(seed)
        self._shape: tuple[int, ...] | None = None
        self._intra = TokenStatistics(0)
        self._sums = torch.empty(0)
        self._outer = torch.empty(0)
        self._tokens: list[Tensor] = []

    @property
    def pairs(self) -> int:
        """Number of corresponding patches so far."""
        return self._intra.pairs

    @torch.no_grad()
    def add(self, tokens: Tensor) -> None:
        """Add one video.

        Args:
            tokens: ``(T, C, h, w)`` floats before the projection; one ``(C, h, w)`` for all.

        Raises:
            GeometryError: tokens of another kind, or of another shape than the first video's.
            FrameError: no more than ``gap`` frames.
        """
        frames = token_frames(tokens, at_least=self.gap + 1)
        shape = tuple(tokens.shape[1:])
        if self._shape not in (None, shape):
            raise GeometryError(
                f"got tokens (C, h, w) = {shape} after a video of {self._shape}; videos are "
                "compared at equal positions, so resize all frames to one size=(height, width)"
            )
        if self._shape is None:
            self._shape = shape
            self._intra = TokenStatistics(shape[0])
            self._sums = torch.zeros(frames.shape[1], shape[0], dtype=torch.float64)
            self._outer = torch.zeros(shape[0], shape[0], dtype=torch.float64)
        maps = rearrange(frames, "t (h w) c -> t c h w", w=shape[2])
        for here, there in zip(maps, maps[self.gap :], strict=False):
            self._intra.add_pairs(*corresponding_patches(here, there))
        middle = frames[len(frames) // 2].to("cpu", torch.float64)
        self._sums += middle
        self._outer += middle.T @ middle
        chosen = torch.randperm(len(middle), generator=self._generator)[: self._kept]
        self._tokens.append(middle[chosen])
        self.videos += 1

    @property
    def intra_covariance(self) -> Tensor:
        """``(C, C)`` float64."""
        return self._intra.intra_covariance

    @property
    def inter_covariance(self) -> Tensor:
        """``(C, C)`` float64.

        Raises:
            StatisticsError: fewer than two videos.
        """
        if self.videos < 2:
            raise StatisticsError(
                f"got {self.videos} videos, expected at least 2: a covariance between videos "
                "needs others to compare with"
            )
        cells = len(self._sums)
        within = self._sums.T @ self._sums / self.videos
        return (self._outer - within) / (cells * (self.videos - 1))

    @torch.no_grad()
    def spectrum(
        self, projection: Callable[[Tensor], Tensor] | None, *, samples: int = 64
    ) -> Spectrum:
        """Take eigenvalues and measure a projection's gain along the eigen-directions.

        Args:
            projection: maps tokens ``(N, C)`` to ``(N, C')``: ``adapter.projection.project``.
                None for none at all.
            samples: tokens, spread evenly over the videos, at which a projection that is not
                affine is differentiated; forward-mode derivatives, not finite differences.

        Raises:
            StatisticsError: fewer than two videos, or no corresponding patches.
            ValueError: ``samples`` below 1.
        """
        if samples < 1:
            raise ValueError(f"got samples={samples}, expected at least 1")
        inter_covariance = self.inter_covariance
        intra, directions = _eigen(self.intra_covariance)
        inter, inter_directions = _eigen(inter_covariance)
        tokens = torch.cat(self._tokens)
        tokens = tokens[torch.linspace(0, len(tokens) - 1, min(samples, len(tokens))).long()]
        both = torch.cat([directions, inter_directions])
        gain = torch.ones(len(both), dtype=torch.float64)
        if projection is not None:
            gain = directional_gain(projection, tokens, both)
        along = ((directions @ inter_covariance) * directions).sum(1).clamp_min(0)
        return Spectrum(
            videos=self.videos,
            pairs=self.pairs,
            intra=intra,
            directions=directions,
            inter=inter,
            inter_along=along,
            gain=gain[: len(directions)],
            inter_gain=gain[len(directions) :],
        )


def spectrum(
    adapter: CoSettleAdapter,
    clips: Iterable[Tensor],
    *,
    size: int | tuple[int, int] | None = None,
    gap: int = 1,
    samples: int = 64,
    batch_size: int = 4,
) -> Spectrum:
    """Measure how tokens vary within and between videos, and what the projection does about it.

    Args:
        adapter: backbone and projection.
        clips: ``(T, 3, H, W)`` uint8 each, at least two, read one at a time.
        size: what frames are resized to; all clips must end up at one size.
        gap: frames between corresponding patches.
        samples: tokens at which the projection is differentiated.
        batch_size: frames a forward pass.

    Raises:
        StatisticsError: fewer than two clips, or none with motion.
        GeometryError: clips of different sizes.
        FrameError: a clip of no more than ``gap`` frames.
    """
    if adapter.config.kind in ("affine", "identity"):
        samples = 1  # the same everywhere
    statistics = SpectrumStatistics(gap=gap)
    for clip in clips:
        features = compare_features(adapter, clip, size=size, batch_size=batch_size)
        statistics.add(features.get(RAW_SAME, features[RAW_LAST]))
    return statistics.spectrum(adapter.projection.project, samples=samples)


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Descending eigenvalues, zeros exactly so, and unit eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[0].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0), rearrange(vectors, "c k -> k c").contiguous()
