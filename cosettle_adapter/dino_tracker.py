"""Deprecated: moved to :mod:`cosettle_adapter.extraction.dino_tracker`.

``examples/dino_tracker_features.py`` prepares a folder for DINO-Tracker, as ``prepare`` did.
"""

from cosettle_adapter.imports import moved_to

__getattr__ = moved_to(__name__, "cosettle_adapter.extraction.dino_tracker")
