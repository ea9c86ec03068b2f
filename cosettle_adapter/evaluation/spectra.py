"""Theory made visible: along which directions features change over time, and what g does there.

The paper's section 4 predicts that a good projection shrinks the directions in which a patch
varies within its video, and keeps or amplifies those in which it does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from cosettle_adapter.closed_form import StatisticsError, TokenStatistics
from cosettle_adapter.correspondence import corresponding_patches
from cosettle_adapter.evaluation.consistency import token_frames
from cosettle_adapter.evaluation.representation_metrics import check_same_shape
from cosettle_adapter.imports import require

_TIE = 1e-5  # relative gains that differ by less are equal: projections are float32
_TOKENS = 4  # kept of each video, at which gains may be evaluated
_ROWS = 4096  # pairs of token and direction that a projection sees at a time


class Prediction(NamedTuple):
    """How far the paper's prediction holds.

    Attributes:
        spearman: rank correlation of intra-video variance and gain over all directions: -1 where
            the projection shrinks exactly in the order of the variance; NaN where all gains, or
            all variances, are equal.
        spearman_share: the same with intra-video over inter-video variance: not merely large
            variance, but large variance that tells no videos apart.
        gain_high: mean relative gain over the quarter of directions with the most intra-video
            variance; predicted below 1.
        gain_low: over the quarter with the least; predicted to be at least 1.
    """

    spearman: float
    spearman_share: float
    gain_high: float
    gain_low: float

    @property
    def holds(self) -> bool:
        """Whether all of it does: order, shrinking and keeping."""
        return self.spearman < 0 and self.gain_high < 1 <= self.gain_low


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variance of corresponding patches by direction, and what the projection does to each.

    All tensors are float64 on the CPU; eigenvalues descend.

    Attributes:
        videos: number of videos.
        pairs: number of corresponding patches within videos.
        intra: ``(C,)`` eigenvalues of the intra-video covariance.
        directions: ``(C, C)``, its unit eigenvectors, one a row.
        inter: ``(C,)`` eigenvalues of the inter-video covariance, along directions of its own.
        inter_along: ``(C,)`` inter-video variance along ``directions``.
        gain: ``(C,)`` :func:`directional_gain` along ``directions``.
    """

    videos: int
    pairs: int
    intra: Tensor
    directions: Tensor
    inter: Tensor
    inter_along: Tensor
    gain: Tensor

    @property
    def relative_gain(self) -> Tensor:
        """``(C,)`` gain over its root mean square: features have no scale of their own."""
        return self.gain / self.gain.square().mean().sqrt()

    @property
    def prediction(self) -> Prediction:
        """The paper's prediction against the gains."""
        gain = (self.relative_gain / _TIE).round() * _TIE
        share = torch.where(self.intra > 0, self.intra / self.inter_along, 0.0)  # never 0 / 0
        quarter = max(1, len(gain) // 4)
        return Prediction(
            spearman=spearman(self.intra, gain),
            spearman_share=spearman(share, gain),
            gain_high=float(gain[:quarter].mean()),
            gain_low=float(gain[-quarter:].mean()),
        )


class SpectrumStatistics:
    """Collects, video by video, what a :class:`Spectrum` is made from.

    * **Intra-video covariance**: of a patch around its own mean over time, half the mean outer
      product of differences between corresponding patches. Those are mutually nearest neighbours
      (cosine, centred) of frames ``gap`` apart; pairs of frames without any difference are left
      out.
    * **Inter-video covariance**: of the patch at one position of the grid over the middle frames
      of all videos (with the V - 1 denominator), mean over positions.
    """

    def __init__(self, *, gap: int = 1) -> None:
        """Begin with no videos; ``gap``, at least 1, is between corresponding patches."""
        if gap < 1:
            raise ValueError(f"got gap={gap}, expected at least 1")
        self.gap = gap
        self.videos = 0
        self._generator = torch.Generator().manual_seed(0)
        self._shape: tuple[int, ...] | None = None
        self._intra = TokenStatistics(0)
        self._sums = self._outer = torch.empty(0)
        self._tokens: list[Tensor] = []

    @property
    def pairs(self) -> int:
        """Number of corresponding patches so far."""
        return self._intra.pairs

    @torch.no_grad()
    def add(self, tokens: Tensor) -> None:
        """Add one video.

        Args:
            tokens: ``(T, C, h, w)`` floats before the projection, more than ``gap`` frames; one
                ``(C, h, w)`` for all videos.
        """
        frames = token_frames(tokens, at_least=self.gap + 1)
        check_same_shape(self._shape, tokens)
        if self._shape is None:
            self._shape, width = tuple(tokens.shape[1:]), frames.shape[2]
            self._intra = TokenStatistics(width)
            self._sums = torch.zeros(frames.shape[1], width, dtype=torch.float64)
            self._outer = torch.zeros(width, width, dtype=torch.float64)
        maps = rearrange(frames, "t (h w) c -> t c h w", w=tokens.shape[3])
        for here, there in zip(maps, maps[self.gap :], strict=False):
            self._intra.add_pairs(*corresponding_patches(here, there))
        middle = frames[len(frames) // 2].to("cpu", torch.float64)
        self._sums += middle
        self._outer += middle.T @ middle
        chosen = torch.randperm(len(middle), generator=self._generator)[:_TOKENS]
        self._tokens.append(middle[chosen])
        self.videos += 1

    @torch.no_grad()
    def spectrum(self, projection: Callable[[Tensor], Tensor], *, samples: int = 64) -> Spectrum:
        """Take eigenvalues and measure a projection's gain along the eigen-directions.

        Args:
            projection: maps tokens ``(N, C)`` to ``(N, C')``: ``adapter.projection.project``.
            samples: tokens, spread evenly over the videos, at which a projection that is not
                affine is differentiated.

        Raises:
            StatisticsError: fewer than two videos, or no corresponding patches.
        """
        if self.videos < 2:
            raise StatisticsError(
                f"got {self.videos} videos, expected at least 2: a covariance between videos "
                "needs others to compare with"
            )
        within = self._sums.T @ self._sums / self.videos
        covariance = (self._outer - within) / (len(self._sums) * (self.videos - 1))
        intra, directions = _eigen(self._intra.intra_covariance)
        tokens = torch.cat(self._tokens)
        rows = torch.linspace(0, len(tokens) - 1, min(samples, len(tokens))).long()
        return Spectrum(
            videos=self.videos,
            pairs=self.pairs,
            intra=intra,
            directions=directions,
            inter=_eigen(covariance)[0],
            inter_along=((directions @ covariance) * directions).sum(1).clamp_min(0),
            gain=directional_gain(projection, tokens[rows], directions),
        )


def directional_gain(
    projection: Callable[[Tensor], Tensor], tokens: Tensor, directions: Tensor
) -> Tensor:
    """Return how much longer small steps along directions become.

    That is the root mean square over tokens of the length of the Jacobian times the direction; for
    an affine projection the length of its matrix times the direction.

    Args:
        projection: maps ``(N, C)`` to ``(N, C')``, row by row.
        tokens: ``(N, C)`` where it is differentiated, in forward mode.
        directions: ``(K, C)`` unit vectors; the gains are ``(K,)`` float64.
    """
    module = getattr(projection, "__self__", projection)
    if isinstance(module, torch.nn.Module):
        for weight in module.parameters():
            tokens = tokens.to(weight)
            break
    directions = directions.to(tokens)
    gains = []
    for part in torch.split(directions, max(1, _ROWS // len(tokens))):
        at = repeat(tokens, "n c -> (k n) c", k=len(part)).contiguous()  # a view for one token
        along = repeat(part, "k c -> (k n) c", n=len(tokens)).contiguous()
        with warnings.catch_warnings():
            # torch's own forward mode compiles a few rules when it is first used
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            moved: Tensor = torch.func.jvp(projection, (at,), (along,))[1]
        squared = rearrange(moved.double().square().sum(-1), "(k n) -> k n", n=len(tokens))
        gains.append(reduce(squared, "k n -> k", "mean").sqrt().cpu())
    return torch.cat(gains)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two ``(N,)`` tensors, ties sharing their mean rank; NaN if constant."""
    stats: Any = require("scipy.stats", extra="eval", purpose="rank correlation")
    ranks = [torch.from_numpy(stats.rankdata(values.numpy())).double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Descending eigenvalues, zeros exactly so, and unit eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[0].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0), rearrange(vectors, "c k -> k c").contiguous()
