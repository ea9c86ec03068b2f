"""VIP (video instance-level human parsing): propagation of 20 classes of body parts and clothes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, Masks
from cosettle_adapter.evaluation.masks import save_labels
from cosettle_adapter.evaluation.protocols import PUBLISHED, ClipScores, Propagation, Protocol
from cosettle_adapter.evaluation.segmentation import propagate_masks
from cosettle_adapter.evaluation.semantic import ConfusionMatrix
from cosettle_adapter.video.geometry import Geometry

VIP_CLASSES = 20  # the background is 0
WHAT = "the folder VIP_Fine, with Images, Annotations/Category_ids and lists"
_LONG_SIDE, _STEP = 880, 64


def vip_clips(
    root: str | Path, *, subset: str = "val", clips: Sequence[str] | None = None
) -> list[Clip[Masks]]:
    """List clips in the layout of the archive VIP_Fine, whose frames are 25 apart.

    That is ``Images/<video>/*.jpg``, ``Annotations/Category_ids/<video>/*.png`` (or
    ``Category_ids/<video>/*.png``) and ``lists/<subset>_videos.txt`` with a video a line, or
    ``lists/<subset>_id.txt`` with a frame a line. Given ``clips``, no list is needed.
    Annotations are label maps ``(A, H, W)`` uint8 of classes, 0 the background.

    Raises:
        FrameError: a folder or list that should be there is not, or a video that does not exist.
    """
    root = folders.data_folder(root, WHAT, ["Images"])
    images, labels = root / "Images", root / "Category_ids"
    if not labels.is_dir():
        labels = root / "Annotations" / "Category_ids"
        folders.data_folder(root, WHAT, ["Annotations/Category_ids"])
    known = folders.entries(images)
    if clips is None:
        files = [f"{subset}_videos.txt", f"{subset}_id.txt"]
        known = folders.read_list([top / name for name in files for top in (root / "lists", root)])

    def make(name: str) -> Clip[Masks]:
        return folders.mask_clip(name, images / name, labels / name)

    return folders.list_clips("VIP video", root, known, clips, make)


def vip_protocol(
    data: Path, *, clips: Sequence[str] | None = None, propagation: Propagation = PUBLISHED
) -> Protocol[Masks]:
    """Return the benchmark on VIP: mIoU from one confusion matrix over all frames of all clips."""
    # VIP takes the top 10
    options = dataclasses.replace(propagation, topk=propagation.topk or 10).options()

    def size(clip: Clip[Masks]) -> tuple[int, int]:
        """The longer side 880, the other floored to a multiple of 64."""
        height, width = clip.read_frame(0).shape[:2]
        other = int(_LONG_SIDE * min(height, width) / max(height, width))
        other = max(_STEP, other // _STEP * _STEP)
        return (other, _LONG_SIDE) if width >= height else (_LONG_SIDE, other)

    def score(
        clip: Clip[Masks], features: Tensor, _: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate the classes of the first frame; it counts as the others do."""
        masks = dict(zip(clip.annotated, clip.read_annotations(), strict=True))
        if 0 not in masks:
            raise FrameError(f"{clip.name!r} has no labels for its first frame")
        matrix = ConfusionMatrix(VIP_CLASSES)
        maps = propagate_masks(features, masks[0], range(VIP_CLASSES), **options)
        for index, labels in enumerate(maps):
            if index in masks:
                matrix.add(masks[index], labels)
            if predictions is not None:
                save_labels(labels, predictions / f"{clip.frames[index].stem}.png")
        return ClipScores({"mIoU": matrix.mean_iou()}, counts={"matrix": matrix.counts.tolist()})

    def total(scores: Sequence[ClipScores]) -> dict[str, float]:
        matrix = ConfusionMatrix(VIP_CLASSES)
        for clip in scores:
            matrix.counts += np.array(clip.counts["matrix"], dtype=np.int64)
        return {"mIoU": matrix.mean_iou()}

    return Protocol(
        "vip", ("mIoU",), lambda: vip_clips(data, clips=clips), size, score, options, total
    )
