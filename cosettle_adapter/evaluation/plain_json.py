# shim: removed at integration
"""JSON under its old place."""

from __future__ import annotations

from cosettle_adapter.evaluation.run import write_json as write_json
