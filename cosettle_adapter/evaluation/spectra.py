"""The directions in which features vary over time, and the projection's gain along them.

The paper's section 4 predicts that a good projection shrinks the directions in which a patch
varies within its video, and keeps or amplifies the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.closed_form import TokenStatistics
from cosettle_adapter.correspondence import corresponding_patches
from cosettle_adapter.evaluation.drift import token_frames
from cosettle_adapter.imports import require

_TIE = 1e-5  # smaller differences of relative gains are rounding: projections are float32
_KEPT = 4  # tokens kept of each video
_SAMPLES = 64  # kept tokens at which gains are evaluated
_ROWS = 4096  # pairs of token and direction per call of the projection


class Spectrum(NamedTuple):
    """Variance of features ``(..., C)`` by direction, and the projection's gain along each."""

    videos: int
    pairs: int  # of corresponding patches
    intra: Tensor  # (C,) eigenvalues of the covariance within videos, descending
    directions: Tensor  # (C, C) their unit eigenvectors as rows
    inter: Tensor  # (C,) eigenvalues of the covariance between videos, descending
    inter_along: Tensor  # (C,) variance between videos along the directions
    gain: Tensor  # (C,) directional_gain along the directions

    @property
    def relative_gain(self) -> Tensor:
        """``(C,)`` gain over its root mean square, independent of the features' scale."""
        return self.gain / self.gain.square().mean().sqrt()

    @property
    def correlations(self) -> tuple[float, float]:
        """Rank correlation of gain with variance within videos, and with its share.

        The first is -1 if the projection shrinks directions exactly in the order of their
        variance, NaN if all gains are equal. The share is variance within over variance between.
        """
        gain = (self.relative_gain / _TIE).round() * _TIE
        share = torch.where(self.intra > 0, self.intra / self.inter_along, 0.0)  # never 0 / 0
        return _spearman(self.intra, gain), _spearman(share, gain)


class SpectrumStatistics:
    """Accumulates the covariances of a :class:`Spectrum` video by video.

    * **Covariance within videos**: half the mean outer product of differences between mutually
      nearest patches (cosine, centred) of neighbouring frames; pairs of equal frames are left out.
    * **Covariance between videos**: covariance of the middle frames' patches over all videos at
      one position of the grid (with the V - 1 denominator), averaged over positions.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._intra = TokenStatistics(0)
        self._sums = self._outer = torch.empty(0)
        self._tokens: list[Tensor] = []

    @property
    def enough(self) -> bool:
        """Whether there are two videos and corresponding patches."""
        return len(self._tokens) > 1 and self._intra.pairs > 0

    @torch.no_grad()
    def add(self, tokens: Tensor) -> None:
        """Add a video's backbone tokens ``(T, C, h, w)``, the same ``(C, h, w)`` for all videos."""
        frames = token_frames(tokens, at_least=2)
        middle = frames[len(frames) // 2].to("cpu", torch.float64)
        if not self._tokens:
            width = frames.shape[2]
            self._intra = TokenStatistics(width)
            self._sums = torch.zeros_like(middle)
            self._outer = torch.zeros(width, width, dtype=torch.float64)
        for here, there in pairwise(tokens):
            self._intra.add_pairs(*corresponding_patches(here, there))
        self._sums += middle
        self._outer += middle.T @ middle
        self._tokens.append(middle[torch.randperm(len(middle), generator=self._generator)[:_KEPT]])

    @torch.no_grad()
    def spectrum(self, projection: Callable[[Tensor], Tensor]) -> Spectrum:
        """Return the spectrum under a projection ``(N, C) -> (N, C')``; needs ``enough``."""
        videos, tokens = len(self._tokens), torch.cat(self._tokens)
        within = self._sums.T @ self._sums / videos
        covariance = (self._outer - within) / (len(self._sums) * (videos - 1))
        intra, directions = eigen(self._intra.intra_covariance)
        along = ((directions @ covariance) * directions).sum(1).clamp_min(0)
        rows = torch.linspace(0, len(tokens) - 1, min(_SAMPLES, len(tokens))).long()
        gain = directional_gain(projection, tokens[rows], directions)
        inter, _ = eigen(covariance)
        return Spectrum(videos, self._intra.pairs, intra, directions, inter, along, gain)


def directional_gain(
    projection: Callable[[Tensor], Tensor], tokens: Tensor, directions: Tensor
) -> Tensor:
    """Return the factors ``(K,)`` by which small steps along unit directions ``(K, C)`` lengthen.

    A factor is the root mean square over tokens ``(N, C)`` of the length of the Jacobian times the
    direction; for an affine projection it is the length of the matrix times the direction.
    """
    module = getattr(projection, "__self__", None)
    if isinstance(module, torch.nn.Module):
        tokens = tokens.to(next(module.parameters(), tokens))
    directions = directions.to(tokens)

    def squared(direction: Tensor) -> Tensor:
        along = direction + torch.zeros_like(tokens)
        moved: Tensor = torch.func.jvp(projection, (tokens,), (along,))[1]
        return moved.double().square().sum(-1).mean()

    with warnings.catch_warnings():
        # torch's forward mode compiles some rules on first use
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        chunk = max(1, _ROWS // len(tokens))
        gains: Tensor = torch.func.vmap(squared, chunk_size=chunk)(directions)
    return gains.sqrt().cpu()


def _spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two ``(N,)`` tensors, ties sharing their mean rank; NaN if constant."""
    stats: Any = require("scipy.stats", extra="eval", purpose="rank correlation")
    ranks = [torch.from_numpy(stats.rankdata(values.numpy())).double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return descending eigenvalues, exactly 0 where below rounding, and eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[0].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0), rearrange(vectors, "c k -> k c").contiguous()
