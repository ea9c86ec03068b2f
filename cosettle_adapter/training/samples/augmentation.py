# shim: removed at integration
"""Moved to data."""

from cosettle_adapter.training.data import Crop, apply_crop, augment, draw_crop, squash

__all__ = ["Crop", "apply_crop", "augment", "draw_crop", "squash"]
