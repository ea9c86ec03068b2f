"""Clips with masks (DAVIS, VIP and your own) and their benchmarks by label propagation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, Masks, images_in, images_named, pick
from cosettle_adapter.evaluation.masks import (
    VOID,
    ConfusionMatrix,
    evaluate_sequence,
    propagate_masks,
    save_labels,
    summarise,
)
from cosettle_adapter.evaluation.protocols import DEFAULT, LabelProtocol, Propagation
from cosettle_adapter.evaluation.run import ClipScores, Protocol, mean
from cosettle_adapter.video import FrameSelection
from cosettle_adapter.video.geometry import Geometry
from cosettle_adapter.video.reader import pending_frames
from cosettle_adapter.video.selection import PendingFrame

logger = logging.getLogger(__name__)

Year = Literal["2016", "2017"]
LateLabels = Literal["error", "keep"]

ALL_FRAMES = FrameSelection()
MASK_MEASURES = ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay")
VIP_CLASSES = 20  # the background is 0
DAVIS = "the folder of DAVIS that holds JPEGImages, Annotations and ImageSets"
FOLDER = "a folder with frames/ and masks/, or a folder of such folders"
VIP = "the folder VIP_Fine, with Images, Annotations/Category_ids and lists"
_MAX_OBJECTS = 64  # of a clip; more different values come from soft edges


def mask_protocol(
    name: str,
    clips: Callable[[], Sequence[Clip[Masks]]],
    propagation: Propagation,
    settings: Mapping[str, Any],
) -> Protocol[Masks]:
    """Return a benchmark that scores propagated masks by J and F."""
    record = propagation.on(name)

    def score(
        clip: Clip[Masks], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate the first mask and score the others; every object has equal weight."""

        def save(index: int, labels: Masks) -> None:
            if predictions is not None:
                save_labels(labels, predictions / f"{clip.frames[index].stem}.png")

        scores = evaluate_sequence(
            propagation.maps(clip, features, geometry),
            clip.read_annotations(),
            annotated=clip.annotated,
            on_mask=save,
            protocol=record,
            size=geometry.resized,
        )
        objects = [  # mean, recall and decay of each
            dict(zip(MASK_MEASURES[1:], (*summarise(j), *summarise(f)), strict=True))
            for j, f in zip(scores.j, scores.f, strict=True)
        ]
        return ClipScores(average(objects), counts={"objects": objects})

    def average(objects: Sequence[Mapping[str, float]]) -> dict[str, float]:
        figures = {name: mean(row[name] for row in objects) for name in MASK_MEASURES[1:]}
        return {"J&F": (figures["J mean"] + figures["F mean"]) / 2, **figures}

    def total(scores: Sequence[ClipScores]) -> dict[str, float]:
        """Average over all objects of all clips, like the official evaluation."""
        return average([row for clip in scores for row in clip.counts["objects"]])

    return Protocol(
        name, MASK_MEASURES, clips, record.frame_size, score,
        {**_settings(record, propagation), **settings}, total, record.preprocess,
    )  # fmt: skip


def _settings(record: LabelProtocol, propagation: Propagation) -> dict[str, Any]:
    """Settings that affect the scores of masks."""
    settings = record.settings("joints", "strongest")
    if propagation.dense is not None:
        upsampler = propagation.upsampler or "bilinear"
        settings |= {"dense": propagation.dense, "upsampler": upsampler}
    return settings


def davis_clips(
    root: str | Path,
    *,
    year: Year | None = None,
    subset: str | None = None,
    resolution: str = "480p",
    clips: Sequence[str] | None = None,
    select: FrameSelection = ALL_FRAMES,
) -> list[Clip[Masks]]:
    """List the clips of DAVIS with masks ``(T, H, W)`` uint8: object ids, 0 background, 255 void.

    The layout is ``JPEGImages/<resolution>/<clip>/*.jpg``,
    ``Annotations/<resolution>/<clip>/*.png`` and ``ImageSets/<year>/<subset>.txt``. The default
    year is the newest available; 2016 merges all objects into one. The default subset is val, or
    train if there is no list of val. In ``select``, the time of a frame is its position divided by
    ``source_fps`` (default 1).
    """
    kinds = [f"JPEGImages/{resolution}", f"Annotations/{resolution}"]
    root = folders.data_folder(root, DAVIS, [*kinds, "ImageSets"])
    year = year or newest_year(root)
    lists = [
        root / "ImageSets" / folder / f"{part}.txt"
        for part in ([subset] if subset else ["val", "train"])
        for folder in ([year] if year == "2017" else [year, "480p"])
    ]

    def make(name: str) -> Clip[Masks]:
        images, labels = (root / kind / name for kind in kinds)
        frames = images_in(images)
        if frames:
            chosen = select.of(pending_frames(frames, select), name)
            frames = [Path(item.name) for item in chosen if isinstance(item, PendingFrame)]
        masks = images_named(labels, [frame.stem for frame in frames], lossless=True)
        missing = [path for path in masks if not path.is_file()] if frames else [images / "*.jpg"]
        if missing:
            raise FrameError(
                f"no {missing[0]}; unpack the {resolution} archive of DAVIS again, or leave the "
                "clip out"
            )

        def read() -> Masks:
            labels = folders.read_masks(masks)
            return (labels > 0).astype(np.uint8) if year == "2016" else labels

        return Clip(name, frames, read, tuple(range(len(frames))), (*frames, *masks))

    return folders.list_clips(f"DAVIS-{year} clip", root, folders.read_list(lists), clips, make)


def davis_protocol(
    *data: Path,
    clips: Sequence[str] | None = None,
    select: FrameSelection | Sequence[FrameSelection] = ALL_FRAMES,
    year: Year | None = None,
    propagation: Propagation = DEFAULT,
) -> Protocol[Masks]:
    """Return the benchmark on DAVIS; several folders are parts of one evaluation.

    With several folders, clips are named ``<folder>/<clip>``; ``clips`` may omit the folder.
    ``select`` is one selection of frames for all folders or one for each.
    """
    selections = [select] if isinstance(select, FrameSelection) else list(select)
    selections = selections * len(data) if len(selections) == 1 else selections
    parts = [] if len(data) == 1 else [folder.resolve().name for folder in data]
    if len(selections) != len(data) or len(set(parts)) != len(parts):
        raise ValueError(
            f"got {len(data)} folders of DAVIS and {len(selections)} selections of frames; "
            "expected one for all or one for each, and folders with different names"
        )

    def listed() -> list[Clip[Masks]]:
        if not parts:
            return davis_clips(data[0], year=year, clips=clips, select=selections[0])
        pairs = [
            (f"{part}/{clip.name}", clip)
            for part, root, selection in zip(parts, data, selections, strict=True)
            for clip in davis_clips(root, year=year, select=selection)
        ]
        known = [name for full, clip in pairs for name in (full, clip.name)]
        names = set(pick(clips, known, f"clip {{}} in {', '.join(map(str, data))}"))
        return [dataclasses.replace(c, name=full) for full, c in pairs if names & {full, c.name}]

    newest = newest_year(data[0]) if data[0].is_dir() else "the newest of the data"
    settings: dict[str, Any] = {"year": year or newest}
    for field in ("every", "max_frames", "start", "end", "fps"):
        values = [getattr(selection, field) for selection in selections]
        settings[field] = values[0] if len(set(values)) == 1 else values
    if parts:
        settings["parts"] = parts
    return mask_protocol("davis", listed, propagation, settings)


def newest_year(root: str | Path) -> Year:
    """Return the newest release for which a folder of DAVIS has lists."""
    return "2017" if (Path(root) / "ImageSets" / "2017").is_dir() else "2016"


def folder_clips(
    root: str | Path, *, clips: Sequence[str] | None = None, late_labels: LateLabels = "error"
) -> list[Clip[Masks]]:
    """List the clips of a folder, each with ``frames/*.jpg`` and ``masks/*.png`` in it.

    Other image formats work too. A mask, palette or grey, has the name of its frame; the first
    frame needs one, and the others are scored if they have one. Frames are in natural order, ``2``
    before ``10``. ``root`` may be a single clip. Labels that first appear after the first frame
    cannot be propagated. ``late_labels="error"`` reports them when masks are read; ``"keep"``
    scores them as DAVIS does: as missed objects, or, above the first mask's highest label, as
    background.

    Returns:
        Clips with masks ``(A, H, W)`` uint8: object ids, 0 background, 255 void. If a clip's masks
        have no values but 0 and 255, then 255 is its one object, with id 1.
    """
    if late_labels not in ("error", "keep"):
        raise ValueError(f"got late_labels={late_labels!r}, expected 'error' or 'keep'")
    root = folders.data_folder(root, FOLDER)
    known = folders.clip_folders(root, FOLDER, ["frames", "masks"])

    def make(name: str) -> Clip[Masks]:
        clip = folders.mask_clip(name, known[name] / "frames", known[name] / "masks")
        return dataclasses.replace(clip, read=lambda: _labels(clip, late_labels))

    return folders.list_clips("clip", root, known, clips, make)


def folder_protocol(
    data: Path,
    *,
    clips: Sequence[str] | None = None,
    late_labels: LateLabels = "error",
    propagation: Propagation = DEFAULT,
) -> Protocol[Masks]:
    """Return the benchmark on your own clips; see :func:`folder_clips`."""
    return mask_protocol(
        "folder",
        lambda: folder_clips(data, clips=clips, late_labels=late_labels),
        propagation,
        {"late_labels": late_labels},
    )


def vip_clips(
    root: str | Path, *, subset: str = "val", clips: Sequence[str] | None = None
) -> list[Clip[Masks]]:
    """List the clips of VIP with label maps ``(A, H, W)`` uint8 of classes, 0 the background.

    The layout is that of the archive VIP_Fine, which has every 25th frame:
    ``Images/<video>/*.jpg``, ``Annotations/Category_ids/<video>/*.png`` (or
    ``Category_ids/<video>/*.png``) and ``lists/<subset>_videos.txt`` with one video per line, or
    ``lists/<subset>_id.txt`` with one frame per line. Given ``clips``, no list is needed.
    """
    root = folders.data_folder(root, VIP, ["Images"])
    images, labels = root / "Images", root / "Category_ids"
    if not labels.is_dir():
        labels = root / "Annotations" / "Category_ids"
        folders.data_folder(root, VIP, ["Annotations/Category_ids"])
    known = folders.entries(images)
    if clips is None:
        files = [f"{subset}_videos.txt", f"{subset}_id.txt"]
        known = folders.read_list([top / name for name in files for top in (root / "lists", root)])

    def make(name: str) -> Clip[Masks]:
        return folders.mask_clip(name, images / name, labels / name)

    return folders.list_clips("VIP video", root, known, clips, make)


def vip_protocol(
    data: Path, *, clips: Sequence[str] | None = None, propagation: Propagation = DEFAULT
) -> Protocol[Masks]:
    """Return the benchmark on VIP: mIoU from one confusion matrix over all frames of all clips."""
    record = propagation.on("vip")

    def score(
        clip: Clip[Masks], features: Tensor, geometry: Geometry, predictions: Path | None
    ) -> ClipScores:
        """Propagate the classes of the first frame; unlike on DAVIS, that frame counts too."""
        masks = dict(zip(clip.annotated, clip.read_annotations(), strict=True))
        if 0 not in masks:
            raise FrameError(f"{clip.name!r} has no labels for its first frame")
        matrix = ConfusionMatrix(VIP_CLASSES)
        maps = propagate_masks(
            propagation.maps(clip, features, geometry),
            masks[0],
            range(VIP_CLASSES),
            protocol=record,
            size=geometry.resized,
        )
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
        "vip", ("mIoU",), lambda: vip_clips(data, clips=clips), record.frame_size, score,
        _settings(record, propagation), total, record.preprocess,
    )  # fmt: skip


def _labels(clip: Clip[Masks], late_labels: LateLabels) -> Masks:
    """Read a clip's object ids and check that they can be scored."""
    masks, size = clip.read_annotations(), clip.read_frame(0).shape[:2]
    folder = clip.inputs[-1].parent
    if masks.shape[1:] != size:
        raise FrameError(
            f"the masks in {folder} are {masks.shape[1]} x {masks.shape[2]}, but the clip's "
            f"frames are {size[0]} x {size[1]}; draw the masks at the size of the frames"
        )
    labels = set(np.unique(masks).tolist())
    if labels <= {0, VOID}:
        masks = (masks == VOID).astype(np.uint8)
    elif len(labels) > _MAX_OBJECTS:
        raise FrameError(
            f"the masks in {folder} have {len(labels)} different values, expected at most "
            f"{_MAX_OBJECTS} object ids; do they have soft edges? Save the masks as PNG, without "
            "anti-aliasing, with one whole number for every object"
        )
    late = ~np.isin(masks, [*np.unique(masks[0]), 0, VOID])
    if late_labels == "error" and late.any():
        path = clip.inputs[len(clip) + int(late.any((1, 2)).argmax())]
        names = ", ".join(map(str, np.unique(masks[late]).tolist()))
        raise FrameError(
            f"{path} of {clip.name!r} has label(s) {names}, which the first mask does not have; "
            "they cannot be propagated. Start the clip at a frame that shows all objects, or pass "
            'late_labels="keep" (--late-labels keep) to score them as DAVIS does'
        )
    highest = int(masks[0][masks[0] != VOID].max(initial=0))
    if absent := sorted(set(range(1, highest)) - labels):
        logger.warning(
            "no mask of %r has object %s; as in DAVIS, every id up to the highest is an object, "
            "and an absent one scores as perfectly propagated. Number the objects 1, 2, 3, ...",
            clip.name, folders.few([*map(str, absent)]),
        )  # fmt: skip
    return masks
