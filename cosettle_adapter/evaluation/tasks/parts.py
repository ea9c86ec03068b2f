"""Semantic part propagation: VIP."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets import VIP_CLASSES, VipClip, vip_clips
from cosettle_adapter.evaluation.metrics import ConfusionMatrix
from cosettle_adapter.evaluation.palette import save_labels
from cosettle_adapter.evaluation.segmentation import propagate_masks
from cosettle_adapter.evaluation.tasks.base import ClipScores, Task
from cosettle_adapter.extras import require
from cosettle_adapter.video.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np

_LONG_SIDE, _STEP = 880, 64


class Vip(Task[VipClip]):
    """mIoU over 20 classes from one confusion matrix over all frames of all clips."""

    name = "vip"
    measures = ("mIoU",)

    def __init__(
        self,
        data: Path,
        *,
        clips: Sequence[str] | None = None,
        protocol: Literal["crw", "dino"] = "crw",
        topk: int | None = 10,
        **options: Any,
    ) -> None:
        """See :func:`~cosettle_adapter.evaluation.datasets.vip_clips`; VIP takes the top 10."""
        self._list_clips = functools.partial(vip_clips, data, videos=clips)
        self.protocol: Literal["crw", "dino"] = protocol
        chosen = {"topk": topk, **options}
        self.options = {key: value for key, value in chosen.items() if value is not None}

    def clips(self) -> Sequence[VipClip]:
        """List the clips."""
        return self._list_clips()

    def size(self, clip: VipClip) -> tuple[int, int]:
        """The longer side 880, the other floored to a multiple of 64."""
        height, width = clip.read_frame(0).shape[:2]
        other = max(_STEP, int(_LONG_SIDE * min(height, width) / max(height, width)))
        other = other // _STEP * _STEP
        return (other, _LONG_SIDE) if width >= height else (_LONG_SIDE, other)

    def score(
        self,
        clip: VipClip,
        features: Tensor,
        geometry: Geometry,
        *,
        predictions: Path | None = None,
    ) -> ClipScores:
        """Propagate the classes of the first frame; it counts as the others do."""
        del geometry
        masks, rows = clip.read_masks(), {frame: row for row, frame in enumerate(clip.annotated)}
        if 0 not in rows:
            raise FrameError(f"{clip.name!r} has no labels for its first frame")
        matrix = ConfusionMatrix(VIP_CLASSES)
        propagated = propagate_masks(
            features, masks[0], range(VIP_CLASSES), protocol=self.protocol, **self.options
        )
        for index, labels in enumerate(propagated):
            if index in rows:
                matrix.add(masks[rows[index]], labels)
            if predictions is not None:
                save_labels(labels, predictions / f"{clip.frames[index].stem}.png")
        return ClipScores({"mIoU": matrix.mean_iou()}, counts={"matrix": matrix.counts.tolist()})

    def total(self, scores: Sequence[ClipScores]) -> dict[str, float]:
        """MIoU of the summed matrices."""
        np: Any = require("numpy", extra="eval", purpose="measuring label maps")
        matrix = ConfusionMatrix(VIP_CLASSES)
        for clip in scores:
            counts: np.ndarray[Any, Any] = np.array(clip.counts["matrix"], dtype=np.int64)
            matrix.counts += counts
        return {"mIoU": matrix.mean_iou()}

    def settings(self) -> dict[str, Any]:
        """Protocol and what differs from it."""
        return {"protocol": self.protocol, **self.options}
