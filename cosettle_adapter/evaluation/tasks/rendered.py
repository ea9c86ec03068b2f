"""Photographs in known motion: do patches match what they show, and how far do they drift?"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cosettle_adapter.analysis import GAPS, Correspondence, match_accuracy, true_correspondences
from cosettle_adapter.evaluation.datasets import RenderedPhoto, rendered_photos
from cosettle_adapter.evaluation.datasets.rendered import AMOUNT, FRAMES, PHOTOMETRIC, SIZE
from cosettle_adapter.evaluation.tasks.base import ClipScores, Task
from cosettle_adapter.video.geometry import Geometry


class Rendered(Task[RenderedPhoto]):
    """Share of patches whose nearest neighbour lies within one patch of the truth, by gap."""

    name = "rendered"
    measures = tuple(f"match@{gap}" for gap in (4, 1, 8))  # compared by the middle one
    drift_by = "true motion"

    def __init__(self, data: Path | None = None, *, clips: Sequence[str] | None = None) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.rendered_photos`."""
        self._list_clips = functools.partial(rendered_photos, data, clips=clips)

    def clips(self) -> Sequence[RenderedPhoto]:
        """List the clips."""
        return self._list_clips()

    def size(self, clip: RenderedPhoto) -> tuple[int, int]:
        """As they are rendered: 280 x 490."""
        del clip
        return SIZE

    def correspondences(
        self, clip: RenderedPhoto, geometry: Geometry
    ) -> Mapping[int, Sequence[Correspondence]]:
        """Gap to the patches that show the same point of a photograph."""
        return {gap: true_correspondences(clip.rendered(), geometry, gap) for gap in GAPS}

    def score(
        self,
        clip: RenderedPhoto,
        features: Tensor,
        geometry: Geometry,
        *,
        predictions: Path | None = None,
    ) -> ClipScores:
        """Match every patch by cosine; there is nothing to write as a prediction."""
        del predictions
        pairs = self.correspondences(clip, geometry)
        found = {f"match@{gap}": match_accuracy(features, pairs[gap]) for gap in GAPS}
        return ClipScores({measure: found[measure] for measure in self.measures})

    def settings(self) -> dict[str, Any]:
        """How the clips are rendered."""
        return {
            "frames": FRAMES,
            "rendered_size": list(SIZE),
            "amount": AMOUNT,
            "photometric": PHOTOMETRIC,
        }
