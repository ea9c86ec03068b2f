"""Point tracking: TAP-Vid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cosettle_adapter.evaluation.datasets import TapVidClip, tapvid_clips
from cosettle_adapter.evaluation.datasets.layout import pick
from cosettle_adapter.evaluation.metrics import queries_first, queries_strided, tapvid_metrics
from cosettle_adapter.evaluation.tasks.base import ClipScores, Task, save_positions
from cosettle_adapter.evaluation.tracking import track_queries
from cosettle_adapter.video.geometry import Geometry

_RASTER = 256  # pixels; what the thresholds belong to
_HIDDEN = 2.0  # cells by which a point that is still visible may miss itself on the way back


class TapVid(Task[TapVidClip]):
    """Points by nearest-neighbour tracking; hidden where the way back misses the point."""

    name = "tapvid"
    measures = ("delta_avg", "OA", "AJ")

    def __init__(
        self,
        data: Path,
        *,
        clips: Sequence[str] | None = None,
        mode: Literal["first", "strided"] = "first",
        hidden: float = _HIDDEN,
    ) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.tapvid_clips`."""
        self._data, self._wanted = data, clips
        self.mode: Literal["first", "strided"] = mode
        self.hidden = hidden

    def clips(self) -> Sequence[TapVidClip]:
        """List the videos."""
        found = tapvid_clips(self._data)
        if self._wanted is None:
            return found
        names = [clip.name for clip in found]
        for name in self._wanted:
            pick(name, names, f"video {name!r} in {self._data}")
        return [clip for clip in found if clip.name in self._wanted]

    def size(self, clip: TapVidClip) -> tuple[int, int]:
        """Shorter side 480, aspect kept."""
        height, width = clip.read_frame(0).shape[:2]
        return round(480 * height / min(height, width)), round(480 * width / min(height, width))

    def score(
        self,
        clip: TapVidClip,
        features: Tensor,
        geometry: Geometry,
        *,
        predictions: Path | None = None,
    ) -> ClipScores:
        """Track every query and score it on a 256 x 256 raster."""
        tracks = clip.read_tracks()
        sample = queries_first if self.mode == "first" else queries_strided
        queries = sample(clip.occluded, tracks)
        height, width = geometry.frame
        to_frame = torch.tensor([width, height], dtype=torch.float64) / _RASTER
        points = torch.from_numpy(queries.points)
        found = track_queries(features, points[:, 0], points[:, 1:].flip(-1) * to_frame, geometry)
        if predictions is not None:
            save_positions(found.xy.numpy(), predictions)
        scores = tapvid_metrics(
            queries.points,
            queries.occluded,
            queries.tracks,
            (found.cycle_error > self.hidden).numpy(),
            (found.xy / to_frame).numpy(),
            mode=self.mode,
        )
        return ClipScores(
            {
                "delta_avg": scores.delta_avg,
                "OA": scores.occlusion_accuracy,
                "AJ": scores.average_jaccard,
            }
        )

    def settings(self) -> dict[str, Any]:
        """How queries are sampled and what counts as hidden."""
        return {"tracking": "nearest neighbour", "mode": self.mode, "hidden_cells": self.hidden}
