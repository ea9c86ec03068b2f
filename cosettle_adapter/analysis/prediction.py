"""Theory made visible: along which directions features change over time, and what g does there.

The paper's section 4 predicts that a good projection shrinks the directions in which a patch
varies within its video, and keeps or amplifies those in which it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_TIE = 1e-5  # relative gains that differ by less are equal: projections are float32


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
        gain: ``(C,)`` how much longer a small step along each of ``directions`` is after the
            projection: the root mean square over sample tokens of the length of its Jacobian
            times the unit direction. For an affine projection that is the length of its matrix
            times the direction, whatever the tokens.
        inter_gain: ``(C,)`` the same along the directions of ``inter``.
    """

    videos: int
    pairs: int
    intra: Tensor
    directions: Tensor
    inter: Tensor
    inter_along: Tensor
    gain: Tensor
    inter_gain: Tensor

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


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two ``(N,)`` tensors, ties sharing their mean rank; NaN if constant."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    scale = math.sqrt(float(ranks[0].square().sum() * ranks[1].square().sum()))
    return float(ranks[0] @ ranks[1]) / scale if scale else math.nan


def _ranks(values: Tensor) -> Tensor:
    values = values.double()
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    below_or_equal = torch.searchsorted(ordered, values, right=True)
    return (below + below_or_equal - 1).double() / 2
