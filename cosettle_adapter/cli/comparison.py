# shim: removed at integration
"""The demo's table under its old place."""

from __future__ import annotations

from cosettle_adapter.cli.tables import terminal_table as terminal_table
from cosettle_adapter.evaluation.tables import comparison as comparison
