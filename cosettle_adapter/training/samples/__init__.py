"""What a step is trained on: frames of a clip, cropped alike; or their views, kept on disk."""

from __future__ import annotations

from cosettle_adapter.training.samples.dataset import TrainingPairs
from cosettle_adapter.training.samples.views import CachedViews

__all__ = ["CachedViews", "TrainingPairs"]
