"""What this package costs beside its encoder, and beside plain ways to do the same.

``cosettle-adapter benchmark`` runs these. Each of :data:`NAMES` is a module whose ``run`` yields
rows; the other sides are in :mod:`cosettle_adapter.benchmark.others`.
"""

from __future__ import annotations

from cosettle_adapter.benchmark.bench import Settings
from cosettle_adapter.benchmark.errors import BenchmarkError
from cosettle_adapter.benchmark.page import findings_of, page, put_summary, read_report, summary
from cosettle_adapter.benchmark.row import Row, Table, Target
from cosettle_adapter.benchmark.run import NAMES, Report, run

__all__ = [
    "NAMES",
    "BenchmarkError",
    "Report",
    "Row",
    "Settings",
    "Table",
    "Target",
    "findings_of",
    "page",
    "put_summary",
    "read_report",
    "run",
    "summary",
]
