"""Affine maps of tokens: what every closed form returns, also for several layers together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.closed_form.statistics import TokenStatistics
from cosettle_adapter.errors import StatisticsError


@dataclasses.dataclass(frozen=True, eq=False)
class AffineMap:
    """``y = W x + b``.

    Attributes:
        weight: ``(C', C)`` float64.
        bias: ``(C',)`` float64.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def identity(cls, width: int) -> AffineMap:
        """Return the map that changes nothing."""
        eye = torch.eye(width, dtype=torch.float64)
        return cls(eye, torch.zeros(width, dtype=torch.float64))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(..., C)`` to ``(..., C')``, in their own dtype and on their device."""
        return F.linear(tokens, self.weight.to(tokens), self.bias.to(tokens))

    def to(self, device: torch.device | str) -> AffineMap:
        """Return the same map on a device."""
        return AffineMap(self.weight.to(device), self.bias.to(device))

    def after(self, first: AffineMap) -> AffineMap:
        """Return the map that applies ``first`` and then this one."""
        return AffineMap(self.weight @ first.weight, self.weight @ first.bias + self.bias)


def solve_layers(
    statistics: TokenStatistics,
    widths: Sequence[int],
    solve: Callable[[TokenStatistics], AffineMap],
    *,
    out_width: int,
) -> AffineMap:
    """Solve for concatenated layers, each with the same weight.

    Later layers of an encoder have larger tokens than earlier ones, which says nothing about
    their worth: each layer is first scaled to the same total variance. The solver's features are
    then turned to their principal axes, of which the ``out_width`` of most variance are kept, so
    that what follows costs no more than with one layer. What is kept has unit variance per
    channel, on average.

    Args:
        statistics: of the concatenated tokens.
        widths: channels of each layer, in order.
        solve: a solver with its strength and nuisance.
        out_width: channels to keep, if there are more.

    Returns:
        A map of the concatenated tokens as the encoder returns them.

    Raises:
        ValueError: widths that do not add up to the statistics' width.
        StatisticsError: what the solver raises, or a layer whose tokens are all equal.
    """
    if sum(widths) != statistics.width:
        raise ValueError(f"layers of {list(widths)} channels are not {statistics.width} in all")
    if len(widths) == 1 and out_width >= widths[0]:
        return solve(statistics)
    scale = layer_scale(statistics.covariance.diagonal(), widths)
    balanced = statistics.scaled(scale)
    found = solve(balanced)
    values, axes = torch.linalg.eigh(found.weight @ balanced.covariance @ found.weight.T)
    kept = axes.flip(1)[:, :out_width].T
    kept = kept / values.flip(0)[:out_width].clamp_min(0).mean().sqrt()
    return AffineMap(kept @ found.weight * scale, kept @ found.bias)


def layer_scale(variance: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the factors ``(C,)`` that give each layer the same total variance.

    Args:
        variance: of each channel, ``(C,)``.
        widths: channels of each layer, in order.

    Raises:
        StatisticsError: a layer without any variance.
    """
    factors = []
    for number, part in enumerate(torch.split(variance, list(widths))):
        if not float(part.sum()) > 0:
            raise StatisticsError(f"all tokens of layer {number} of {len(widths)} are equal")
        factors.append(part.sum().rsqrt().expand(len(part)))
    scale = torch.cat(factors)
    # mean factor 1: the channels keep about their own scale
    return scale / scale.mean()
