"""Pose: joints of people by label propagation (JHMDB), of animals by tracking (BADJA)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.evaluation.datasets import BadjaClip, JhmdbClip, badja_clips, jhmdb_clips
from cosettle_adapter.evaluation.joints import propagate_joints
from cosettle_adapter.evaluation.metrics import Pck, badja_accuracy, pck
from cosettle_adapter.evaluation.tasks.base import ClipScores, Task, save_positions
from cosettle_adapter.evaluation.tracking import track_queries
from cosettle_adapter.extras import require
from cosettle_adapter.video.geometry import Geometry

_THRESHOLDS = (0.1, 0.2)
_MEASURES = tuple(f"PCK@{threshold:g}" for threshold in _THRESHOLDS)


class Jhmdb(Task[JhmdbClip]):
    """PCK of 15 joints, pooled over all frames of all clips but the first of each."""

    name = "jhmdb"
    measures = _MEASURES

    def __init__(
        self,
        data: Path,
        *,
        clips: Sequence[str] | None = None,
        protocol: Literal["crw", "dino"] = "crw",
        **options: Any,
    ) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.jhmdb_clips`."""
        self._list_clips = functools.partial(jhmdb_clips, data, clips=clips)
        self.protocol: Literal["crw", "dino"] = protocol
        self.options = {key: value for key, value in options.items() if value is not None}

    def clips(self) -> Sequence[JhmdbClip]:
        """List the clips."""
        return self._list_clips()

    def size(self, clip: JhmdbClip) -> tuple[int, int]:
        """320 x 320."""
        del clip
        return (320, 320)

    def score(
        self,
        clip: JhmdbClip,
        features: Tensor,
        geometry: Geometry,
        *,
        predictions: Path | None = None,
    ) -> ClipScores:
        """Propagate a heat map for every joint; positions are those of the original frames."""
        joints = clip.read_joints()
        xy = torch.from_numpy(joints.xy)
        cells, found = propagate_joints(
            features, geometry.pixels_to_cells(xy[0]), protocol=self.protocol, **self.options
        )
        guess = geometry.cells_to_pixels(cells.double().cpu()).numpy()
        if predictions is not None:
            save_positions(guess, predictions)
        counted = pck(joints.xy, guess, thresholds=_THRESHOLDS, visible=found.cpu().numpy())
        return ClipScores(
            _named(counted),
            counts={"correct": counted.correct.tolist(), "total": counted.total.tolist()},
        )

    def total(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """PCK of the pooled counts."""
        np: Any = require("numpy", extra="eval", purpose="measuring joints")
        pooled = [
            Pck(_THRESHOLDS, np.array(clip.counts["correct"]), np.array(clip.counts["total"]))
            for clip in scores
        ]
        return _named(functools.reduce(lambda one, other: one + other, pooled))

    def settings(self) -> dict[str, Any]:
        """Protocol and what differs from it."""
        return {"protocol": self.protocol, **self.options}


def _named(counted: Pck) -> dict[str, float]:
    return {f"PCK@{threshold:g}": share for threshold, share in counted.mean.items()}


class Badja(Task[BadjaClip]):
    """Joints of animals by nearest-neighbour tracking, each from where it is first seen."""

    name = "badja"
    measures = ("delta_seg", "delta_3px")

    def __init__(
        self, data: Path, *, clips: Sequence[str] | None = None, davis: Path | None = None
    ) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.badja_clips`."""
        self._list_clips = functools.partial(badja_clips, data, clips=clips, davis=davis)

    def clips(self) -> Sequence[BadjaClip]:
        """List the clips."""
        return self._list_clips()

    def size(self, clip: BadjaClip) -> tuple[int, int]:
        """480 x 880, as for DAVIS, from which the clips are."""
        del clip
        return (480, 880)

    def score(
        self,
        clip: BadjaClip,
        features: Tensor,
        geometry: Geometry,
        *,
        predictions: Path | None = None,
    ) -> ClipScores:
        """Track every joint from its first annotated frame; frames before it do not count."""
        np: Any = require("numpy", extra="eval", purpose="measuring joints")
        joints, annotated = clip.read_joints(), np.asarray(clip.annotated)
        seen = joints.visible.any(0)
        first = joints.visible.argmax(0)
        where = joints.xy[first[seen], seen.nonzero()[0]]
        tracks = track_queries(features, annotated[first[seen]], torch.from_numpy(where), geometry)
        guess = np.zeros_like(joints.xy)
        guess[:, seen] = rearrange(tracks.xy, "q t two -> t q two").numpy()[annotated]
        if predictions is not None:
            save_positions(guess, predictions)
        found = badja_accuracy(
            joints.xy, guess, joints.visible, clip.read_areas(), query_frames=first
        )
        return ClipScores({"delta_seg": found.delta_seg, "delta_3px": found.delta_3px})

    def settings(self) -> dict[str, Any]:
        """How it tracks."""
        return {"tracking": "nearest neighbour", "queries": "where a joint is first annotated"}
