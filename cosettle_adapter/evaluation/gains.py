# shim: removed at integration
"""The bootstrap under its old place."""

from __future__ import annotations

from cosettle_adapter.evaluation.tables import paired_interval as paired_interval
