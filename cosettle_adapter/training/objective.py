# shim: removed at integration
"""Moved to encoding, losses and settings."""

from cosettle_adapter.training.encoding import Views, draw_offsets, encode_views
from cosettle_adapter.training.losses import Losses, objective
from cosettle_adapter.training.settings import ObjectiveSettings

__all__ = ["Losses", "ObjectiveSettings", "Views", "draw_offsets", "encode_views", "objective"]
