# shim: removed at integration
"""Old place of what is now in ``training/positions.py``."""

import importlib

_training = importlib.import_module("cosettle_adapter.training.positions")
Grid = tuple[int, int]
crop_corners = _training.crop_corners
zoomed_side = _training.zoomed_side

__all__ = ["Grid", "crop_corners", "zoomed_side"]
