"""Medians with their spread, and how sure a ratio of two of them is."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch

_DRAWS = 2000
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing, summed up.

    Attributes:
        median: of all measurements.
        low: lower quartile.
        high: upper quartile.
        count: how many there were.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up one or more measurements."""
        if not values:
            raise ValueError("expected one or more measurements, got none")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, len(values))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The ratio of two medians.

    Attributes:
        value: median of the numerators over median of the denominators.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """Divide medians of measurements that were made in pairs, one after the other.

        The interval is a bootstrap over pairs, so that what slows a machine down for a while,
        and both sides with it, widens neither. The draws are always the same.
        """
        if len(numerators) != len(denominators) or not numerators:
            raise ValueError(
                f"expected one or more pairs, got {len(numerators)} and {len(denominators)}"
            )
        top, bottom = (
            torch.tensor(values, dtype=torch.float64) for values in (numerators, denominators)
        )
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(top), (_DRAWS, len(top)), generator=generator)
        ratios = _median(top[drawn]) / _median(bottom[drawn])
        tail = (1 - _CONFIDENCE) / 2
        low, high = ratios.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        value = statistics.median(numerators) / statistics.median(denominators)
        return cls(value, low, high)

    def map(self, function: Callable[[float], float]) -> Ratio:
        """Apply a monotone function to the value and the ends of its interval."""
        low, high = sorted((function(self.low), function(self.high)))
        return Ratio(function(self.value), low, high)


def _median(rows: torch.Tensor) -> torch.Tensor:
    return rows.quantile(0.5, dim=1)
