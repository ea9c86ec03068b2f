"""Closed forms for several blocks of an encoder that are read together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cosettle_adapter.closed_form.affine import AffineMap
from cosettle_adapter.closed_form.statistics import StatisticsError, TokenStatistics


def solve_blocks(
    statistics: TokenStatistics,
    widths: Sequence[int],
    solve: Callable[[TokenStatistics], AffineMap],
    *,
    out_width: int,
) -> AffineMap:
    """Solve for concatenated blocks, each counting alike, and keep the axes of most variance.

    Later blocks of an encoder have larger tokens than earlier ones, which says nothing about
    their worth: each block is first scaled to one and the same total variance. The solver's
    features are then turned to their principal axes, of which the ``out_width`` of most variance
    are kept, so that whatever comes after costs no more than with one block. What is kept has
    unit variance per channel, on average.

    Args:
        statistics: of the concatenated tokens.
        widths: channels of each block, in order.
        solve: a solver with its strength and nuisance.
        out_width: channels to keep, if there are more.

    Returns:
        A map of the concatenated tokens as the encoder gives them.

    Raises:
        ValueError: widths that do not make up the statistics' own.
        StatisticsError: what the solver raises, or a block whose tokens are all equal.
    """
    if sum(widths) != statistics.width:
        raise ValueError(f"blocks of {list(widths)} channels are not {statistics.width} in all")
    if len(widths) == 1 and out_width >= widths[0]:
        return solve(statistics)
    scale = block_scale(statistics.covariance.diagonal(), widths)
    balanced = statistics.scaled(scale)
    found = solve(balanced)
    values, axes = torch.linalg.eigh(found.weight @ balanced.covariance @ found.weight.T)
    kept = axes.flip(1)[:, :out_width].T
    kept = kept / values.flip(0)[:out_width].clamp_min(0).mean().sqrt()
    return AffineMap(kept @ found.weight * scale, kept @ found.bias)


def block_scale(variance: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the factors ``(C,)`` that give each block the same total variance.

    Args:
        variance: of each channel, ``(C,)``.
        widths: channels of each block, in order.

    Raises:
        StatisticsError: a block without any variance.
    """
    factors = []
    for number, part in enumerate(torch.split(variance, list(widths))):
        if not float(part.sum()) > 0:
            raise StatisticsError(f"all tokens of block {number} of {len(widths)} are equal")
        factors.append(part.sum().rsqrt().expand(len(part)))
    scale = torch.cat(factors)
    # mean factor 1: the channels keep about their own scale
    return scale / scale.mean()
