"""Statistics that a projection is fitted to; they live where they are also looked at."""

from __future__ import annotations

from cosettle_adapter.analysis.statistics import StatisticsError, TokenStatistics

__all__ = ["StatisticsError", "TokenStatistics"]
