"""VIP (video instance-level human parsing): propagation of 20 classes of body parts and clothes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.clips import (
    Clip,
    data_folder,
    entries,
    few,
    found_in,
    images_in,
    label_maps_in,
    pick,
    read_masks,
)
from cosettle_adapter.evaluation.palette import save_labels
from cosettle_adapter.evaluation.protocols import PUBLISHED, ClipScores, Propagation, Protocol
from cosettle_adapter.evaluation.segmentation import propagate_masks
from cosettle_adapter.evaluation.semantic import ConfusionMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cosettle_adapter.video.geometry import Geometry

    Masks = NDArray[np.uint8]

VIP_CLASSES = 20  # the background is 0
WHAT = "the folder VIP_Fine, with Images, Annotations/Category_ids and lists"
_LONG_SIDE, _STEP = 880, 64


def vip_clips(
    root: str | Path, *, subset: str = "val", clips: Sequence[str] | None = None
) -> list[Clip[Masks]]:
    """List the clips of VIP in the official layout; nothing is read but names.

    The layout is that of the archive VIP_Fine: ``Images/<video>/*.jpg``,
    ``Annotations/Category_ids/<video>/*.png`` (or ``Category_ids/<video>/*.png``) and
    ``lists/<subset>_videos.txt`` with a video a line. Its frames are 25 apart. Lists of frames,
    ``lists/<subset>_id.txt`` with ``<video>/<frame>`` a line, serve as well.

    Args:
        root: the folder that holds ``Images``.
        subset: ``"val"`` (50 videos) or ``"train"``.
        clips: names of the videos wanted; by default all of the subset. Given these, no list is
            needed.

    Returns:
        The clips, in the order of ``clips`` or of the list. Annotations are label maps
        ``(A, H, W)`` uint8 of classes, 0 the background.

    Raises:
        FrameError: a folder or list that should be there is not, or a video that does not exist.
    """
    root = data_folder(root, WHAT, ["Images"])
    labels = root / "Category_ids"
    if not labels.is_dir():
        labels = data_folder(root, WHAT, ["Annotations/Category_ids"]) / "Annotations/Category_ids"
    names = _listed(root, subset) if clips is None else list(clips)
    pick(clips, entries(root / "Images"), f"video {{}} in {root / 'Images'}")
    return [_clip(root / "Images" / name, labels / name) for name in names]


def vip_protocol(
    data: Path, *, clips: Sequence[str] | None = None, propagation: Propagation = PUBLISHED
) -> Protocol[Masks]:
    """Return the benchmark on VIP: mIoU from one confusion matrix over all frames of all clips."""
    # VIP takes the top 10
    options = dataclasses.replace(propagation, topk=propagation.topk or 10).options()

    def size(clip: Clip[Masks]) -> tuple[int, int]:
        """The longer side 880, the other floored to a multiple of 64."""
        height, width = clip.read_frame(0).shape[:2]
        other = max(_STEP, int(_LONG_SIDE * min(height, width) / max(height, width)))
        other = other // _STEP * _STEP
        return (other, _LONG_SIDE) if width >= height else (_LONG_SIDE, other)

    def score(
        clip: Clip[Masks], features: Tensor, _: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate the classes of the first frame; it counts as the others do."""
        masks, rows = clip.read_annotations(), {f: row for row, f in enumerate(clip.annotated)}
        if 0 not in rows:
            raise FrameError(f"{clip.name!r} has no labels for its first frame")
        matrix = ConfusionMatrix(VIP_CLASSES)
        maps = propagate_masks(features, masks[0], range(VIP_CLASSES), **options)
        for index, labels in enumerate(maps):
            if index in rows:
                matrix.add(masks[rows[index]], labels)
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


def _clip(images: Path, labels: Path) -> Clip[Masks]:
    name, frames, masks = images.name, images_in(images), label_maps_in(labels)
    place = {frame.stem: index for index, frame in enumerate(frames)}
    strangers = [path.name for path in masks if path.stem not in place]
    problem = None
    if not frames:
        problem = f"has no frames: {images} holds {found_in(images)}"
    elif not masks:
        problem = f"has no PNG masks: {labels} holds {found_in(labels)}"
    elif strangers:
        problem = f"has masks without a frame in {images}: {few(strangers)}"
    elif masks[0].stem != frames[0].stem:
        expected = labels / f"{frames[0].stem}.png"
        problem = f"has no mask for its first frame {frames[0].name}, expected {expected}"
    return Clip(
        name,
        frames,
        lambda: read_masks(masks),
        tuple(place[path.stem] for path in masks if path.stem in place),
        (*frames, *masks),
        None if problem is None else f"VIP video {name!r} {problem}",
    )


def _listed(root: Path, subset: str) -> list[str]:
    names = (f"{subset}_videos.txt", f"{subset}_id.txt")
    candidates = [folder / name for name in names for folder in (root / "lists", root)]
    for path in candidates:
        if path.is_file():
            lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            return list(dict.fromkeys(_video(line) for line in lines))
    known = [name.rpartition("_")[0] for name in entries(root / "lists")]
    raise FrameError(
        f"no {subset} list in {root}: expected {candidates[0]}, found "
        f"{found_in(root / 'lists')} in lists; without one, pass the names of videos as clips=."
        + did_you_mean(subset, known)
    )


def _video(entry: str) -> str:
    """The video of a list's entry: its name, the path of its folder, or that of a frame."""
    parts = Path(entry).parts
    is_frame = len(parts) > 1 and Path(parts[-1]).stem.isdigit()
    return parts[-2] if is_frame else parts[-1]
