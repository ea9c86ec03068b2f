"""A user's own clips: a folder of frames beside a folder of masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, Masks
from cosettle_adapter.evaluation.protocols import PUBLISHED, Propagation, Protocol, mask_protocol
from cosettle_adapter.evaluation.segmentation import VOID

LateLabels = Literal["error", "void"]
_MANY = 64  # more labels than this in one clip are not objects
WHAT = "a folder with frames/ and masks/, or of such folders"


def folder_clips(
    root: str | Path, *, clips: Sequence[str] | None = None, late_labels: LateLabels = "error"
) -> list[Clip[Masks]]:
    """List the clips of a folder, each with ``frames/*.jpg`` and ``masks/*.png`` in it.

    Other images serve as well. A mask, palette or grey, belongs to the frame of the same name; the
    first frame needs one, the others may have one and are scored where they do. Names go in natural
    order, ``2`` before ``10``. ``root`` may be a single clip. ``late_labels``, which appear after
    the first frame and cannot be propagated, are an error when masks are read or do not count.

    Returns:
        Clips with masks ``(A, H, W)`` uint8 of object ids, 0 the background, 255 void. Where masks
        have no values but 0 and 255, 255 is not void but their one object, id 1.

    Raises:
        FrameError: no such folder, no clip in it, or a clip that is not there.
        ValueError: an unknown ``late_labels``.
    """
    if late_labels not in ("error", "void"):
        raise ValueError(f"got late_labels={late_labels!r}, expected 'error' or 'void'")
    root = folders.data_folder(root, WHAT)
    found = folders.clip_folders(root, WHAT, ["frames", "masks"])

    def make(name: str) -> Clip[Masks]:
        clip = folders.mask_clip(name, found[name] / "frames", found[name] / "masks")
        return dataclasses.replace(clip, read=lambda: _labels(clip, late_labels))

    return folders.list_clips("clip", root, found, clips, make)


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


def _labels(clip: Clip[Masks], late_labels: LateLabels) -> Masks:
    """Object ids as they are scored, or why they cannot be."""
    masks, size = clip.read_annotations(), clip.read_frame(0).shape[:2]
    if masks.shape[1:] != size:
        raise FrameError(
            f"the masks of {clip.name!r} are {masks.shape[1]} x {masks.shape[2]}, but its "
            f"frames are {size[0]} x {size[1]}; draw the masks at the size of the frames"
        )
    labels = set(np.unique(masks).tolist())
    if labels <= {0, VOID}:
        masks = (masks == VOID).astype(np.uint8)
    elif len(labels) > _MANY:
        raise FrameError(
            f"the masks of {clip.name!r} have {len(labels)} different values, more than the "
            f"{_MANY} expected of labels; soft edges are no labels: save the masks as PNG, "
            "without anti-aliasing, with one whole number for every object"
        )
    late = ~np.isin(masks, [*np.unique(masks[0]), 0, VOID])
    if late_labels == "error" and late.any():
        path = clip.inputs[len(clip) + int(late.any((1, 2)).argmax())]
        names = ", ".join(map(str, np.unique(masks[late]).tolist()))
        raise FrameError(
            f"{path} of {clip.name!r} has label(s) {names}, which the first mask does not have, so "
            "they cannot be propagated; start the clip at a frame that shows all objects, or pass "
            'late_labels="void" (--late-labels void) to leave them out of the scores'
        )
    masks[late] = VOID
    return masks
