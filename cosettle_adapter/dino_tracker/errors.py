"""Errors of writing for DINO-Tracker."""

from __future__ import annotations

from cosettle_adapter.errors import CosettleError


class DinoTrackerError(CosettleError, ValueError):
    """A folder, a backbone or features that DINO-Tracker could not use."""
