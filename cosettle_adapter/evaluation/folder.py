"""A user's own clips: a folder of frames beside a folder of masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import (
    Clip,
    data_folder,
    entries,
    few,
    found_in,
    images_in,
    label_maps_in,
    nearby,
    pick,
    read_masks,
)
from cosettle_adapter.evaluation.images import read_frame
from cosettle_adapter.evaluation.protocols import PUBLISHED, Propagation, Protocol, mask_protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Masks = NDArray[np.uint8]

VOID = 255
LateLabels = Literal["error", "void"]
_MANY = 64  # more labels than this in one clip are not objects
WHAT = "a folder with frames/ and masks/, or of such folders"


def folder_clips(
    root: str | Path,
    *,
    clips: Sequence[str] | None = None,
    late_labels: LateLabels = "error",
) -> list[Clip[Masks]]:
    """List clips laid out as a folder of frames and a folder of masks.

    The layout of a clip is ``frames/*.jpg`` (or any other image) and ``masks/*.png`` (or another
    image without loss), palette or grey, whose values are object ids, 0 the background and 255
    void. A mask belongs to the frame of the same name; the first frame needs one, the others may
    have one and are scored where they do. Names go in natural order, ``2`` before ``10``.

    Args:
        root: the folder of one clip, or a folder of such folders; others in it are passed over.
        clips: names of the clips wanted, that is of their folders; by default all.
        late_labels: for labels that appear after the first frame and cannot be propagated:
            ``"error"`` when the masks are read, or ``"void"``, pixels that do not count.

    Returns:
        The clips by name. Annotations are masks ``(A, H, W)`` uint8 of object ids, 0 the
        background, 255 void. Where masks have no values but 0 and 255, 255 is not void but their
        one object, id 1.

    Raises:
        FrameError: no such folder, no clip in it, or a clip that is not there.
        ValueError: an unknown ``late_labels``.
    """
    if late_labels not in ("error", "void"):
        raise ValueError(f"got late_labels={late_labels!r}, expected 'error' or 'void'")
    root = data_folder(root, WHAT)
    children = [root] if (root / "frames").is_dir() else [root / name for name in entries(root)]
    folders = [path for path in children if (path / "frames").is_dir() or (path / "masks").is_dir()]
    if not folders:
        raise FrameError(
            f"{root} is not {WHAT}: expected frames and masks in it, found {found_in(root)}."
            + (nearby(root, ["frames", "masks"]) or nearby(root, ["*/frames", "*/masks"]))
        )
    found = {folder.resolve().name: folder for folder in folders}
    wanted = set(pick(clips, found, f"clip {{}} in {root}"))
    return [_clip(found[name], name, late_labels) for name in found if name in wanted]


def folder_protocol(
    data: Path,
    *,
    clips: Sequence[str] | None = None,
    late_labels: LateLabels = "error",
    propagation: Propagation = PUBLISHED,
) -> Protocol[Masks]:
    """Return the benchmark on clips of one's own; see :func:`folder_clips`."""

    def listed() -> list[Clip[Masks]]:
        return folder_clips(data, clips=clips, late_labels=late_labels)

    return mask_protocol("folder", listed, propagation, {"late_labels": late_labels})


def _clip(folder: Path, name: str, late_labels: LateLabels) -> Clip[Masks]:
    frames, masks = images_in(folder / "frames"), label_maps_in(folder / "masks")
    place = {path.stem: index for index, path in enumerate(frames)}
    annotated = tuple(place[path.stem] for path in masks if path.stem in place)

    def read() -> Masks:
        found = read_masks(masks)
        size = read_frame(frames[0]).shape[:2]
        if found.shape[1:] != size:
            raise FrameError(
                f"the masks of {name!r} are {found.shape[1]} x {found.shape[2]}, but its "
                f"frames are {size[0]} x {size[1]}; draw the masks at the size of the frames"
            )
        return _labels(found, name, masks, late_labels)

    problem = _problem(folder, frames, masks)
    return Clip(name, frames, read, annotated, (*frames, *masks), problem)


def _labels(masks: Masks, name: str, paths: Sequence[Path], late_labels: LateLabels) -> Masks:
    """Object ids as they are scored, or why they cannot be."""
    labels = set(np.unique(masks).tolist())
    if labels <= {0, VOID}:
        masks = (masks == VOID).astype(np.uint8)
    elif len(labels) > _MANY:
        raise FrameError(
            f"the masks of {name!r} have {len(labels)} different values, more than the "
            f"{_MANY} expected of labels; soft edges are no labels: save the masks as PNG, "
            "without anti-aliasing, with one whole number for every object"
        )
    first = set(np.unique(masks[0]).tolist()) | {0, VOID}
    if first == {0, VOID}:
        raise FrameError(
            f"the first mask of {name!r}, {paths[0]}, has no object (no value from 1 to 254), so "
            "there is nothing to propagate; start the clip at a frame that shows one"
        )
    late = ~np.isin(masks, list(first))
    if late_labels == "error" and late.any():
        position = int(late.any((1, 2)).argmax())
        names = ", ".join(map(str, np.unique(masks[late]).tolist()))
        raise FrameError(
            f"{paths[position]} of {name!r} has label(s) {names}, which the first mask does not "
            "have, so they cannot be propagated; start the clip at a frame that shows all objects, "
            'or pass late_labels="void" (--late-labels void) to leave them out of the scores'
        )
    masks[late] = VOID
    return masks


def _problem(folder: Path, frames: tuple[Path, ...], masks: tuple[Path, ...]) -> str | None:
    for kind, found, what in (("frames", frames, "images"), ("masks", masks, "PNG masks")):
        if not found:
            return (
                f"{folder} is not a clip: expected {what} in {folder / kind}, found "
                f"{found_in(folder / kind)}"
            )
    if len(frames) == 1:
        return (
            f"{folder} has a single frame, {frames[0].name}, so there is nothing to propagate to; "
            "a clip needs at least two, and three for scores without the first and the last"
        )
    stems = [path.stem for path in frames]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        return f"{folder / 'frames'} has several files for frame {few(twice)}; keep one of each"
    strangers = [path.name for path in masks if path.stem not in set(stems)]
    if strangers:
        return (
            f"{folder / 'masks'} has {len(strangers)} mask(s) without a frame: {few(strangers)}; "
            f"a mask has the name of its frame, and the frames are {few([f.name for f in frames])}"
        )
    if masks[0].stem != stems[0]:
        return (
            f"the first frame of {folder}, {frames[0].name}, has no mask: the first of them is "
            f"{masks[0].name}; draw one, or remove the frames before it"
        )
    return None
