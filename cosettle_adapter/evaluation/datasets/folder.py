"""A user's own clips: a folder of frames beside a folder of masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets.clips import MaskClip
from cosettle_adapter.evaluation.datasets.layout import (
    entries,
    existing_folder,
    few,
    found_in,
    images_in,
    nearby,
    pick,
)
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VOID = 255
_MANY = 64  # more labels than this in one clip are not objects
WHAT = "a folder with frames/ and masks/, or of such folders"


@dataclasses.dataclass(frozen=True)
class FolderClip(MaskClip):
    """A clip of one's own, read when asked.

    Attributes:
        name: the clip's folder.
        frames: paths of its frames, in natural order.
        annotations: paths of its masks, for the first frame and any others.
        late_labels: what becomes of labels that the first mask does not have.
        problem: what is wrong with it, or None; then reading raises it.
    """

    late_labels: Literal["error", "void"]

    def read_masks(self) -> NDArray[np.uint8]:
        """Read all masks: ``(A, H, W)`` uint8 object ids, 0 the background, 255 void.

        The first one belongs to frame 0, the others to the frames of ``annotated``. In a clip
        whose masks have no values but 0 and 255, 255 is not void but its one object, id 1.

        Raises:
            FrameError: the clip has a problem, a mask that is damaged, not a palette or grey
                image, or of another size than the frames, a first mask without objects, or a label
                that it does not have.
        """
        np: Any = require("numpy", extra="eval", purpose="reading masks")
        masks = super().read_masks()
        size = self.read_frame(0).shape[:2]
        if masks.shape[1:] != size:
            raise FrameError(
                f"the masks of {self.name!r} are {masks.shape[1]} x {masks.shape[2]}, but its "
                f"frames are {size[0]} x {size[1]}; draw the masks at the size of the frames"
            )
        labels = set(np.unique(masks).tolist())
        if labels <= {0, VOID}:
            masks = (masks == VOID).astype(np.uint8)
        elif len(labels) > _MANY:
            raise FrameError(
                f"the masks of {self.name!r} have {len(labels)} different values, more than the "
                f"{_MANY} expected of labels; soft edges are no labels: save the masks as PNG, "
                "without anti-aliasing, with one whole number for every object"
            )
        return self._settle_late(masks, set(np.unique(masks[0]).tolist()))

    def _settle_late(self, masks: NDArray[np.uint8], first: set[int]) -> NDArray[np.uint8]:
        np: Any = require("numpy", extra="eval", purpose="reading masks")
        if not first - {0, VOID}:
            raise FrameError(
                f"the first mask of {self.name!r}, {self.annotations[0]}, has no object (no value "
                "from 1 to 254), so there is nothing to propagate; start the clip at a frame that "
                "shows one"
            )
        late = ~np.isin(masks, [*first, 0, VOID])
        if self.late_labels == "error" and late.any():
            position = int(late.any((1, 2)).argmax())
            names = ", ".join(map(str, np.unique(masks[late]).tolist()))
            raise FrameError(
                f"{self.annotations[position]} of {self.name!r} has label(s) {names}, which the "
                "first mask does not have, so they cannot be propagated; start the clip at a frame "
                'that shows all objects, or pass late_labels="void" (--late-labels void) to leave '
                "them out of the scores"
            )
        masks[late] = VOID
        return masks


def folder_clips(
    root: str | Path,
    *,
    clips: Sequence[str] | None = None,
    late_labels: Literal["error", "void"] = "error",
) -> list[FolderClip]:
    """List clips laid out as a folder of frames and a folder of masks.

    The layout of a clip is ``frames/*.jpg`` (or any other image) and ``masks/*.png``, palette or
    grey, whose values are object ids, 0 the background and 255 void. A mask belongs to the frame
    of the same name; the first frame needs one, the others may have one and are scored where they
    do. Names go in natural order, ``2`` before ``10``.

    Args:
        root: the folder of one clip, or a folder of such folders; others in it are passed over.
        clips: names of the clips wanted, that is of their folders; by default all.
        late_labels: for labels that appear after the first frame and cannot be propagated:
            ``"error"`` when the masks are read, or ``"void"``, pixels that do not count.

    Returns:
        The clips by name. One that cannot be used (a mask without a frame, no mask for the first
        frame, a single frame) has a ``problem`` and raises it when read.

    Raises:
        FrameError: no such folder, no clip in it, or a clip that is not there.
        ValueError: an unknown ``late_labels``.
    """
    if late_labels not in ("error", "void"):
        raise ValueError(f"got late_labels={late_labels!r}, expected 'error' or 'void'")
    root = existing_folder(root, WHAT)
    if (root / "frames").is_dir():
        folders = [root]
    else:
        children = [root / name for name in entries(root)]
        folders = [
            path for path in children if any((path / kind).is_dir() for kind in ("frames", "masks"))
        ]
    if not folders:
        raise FrameError(
            f"{root} is not {WHAT}: expected frames and masks in it, found {found_in(root)}."
            + (nearby(root, ["frames", "masks"]) or nearby(root, ["*/frames", "*/masks"]))
        )
    names = [folder.resolve().name for folder in folders]
    for name in clips or ():
        pick(name, names, f"clip {name!r} in {root}")
    return [
        _clip(folder, name, late_labels)
        for folder, name in zip(folders, names, strict=True)
        if clips is None or name in clips
    ]


def _clip(folder: Path, name: str, late_labels: Literal["error", "void"]) -> FolderClip:
    frames = images_in(folder / "frames")
    held = images_in(folder / "masks")
    masks = tuple(path for path in held if path.suffix.lower() == ".png")
    return FolderClip(name, frames, masks, late_labels, problem=_problem(folder, frames, masks))


def _problem(folder: Path, frames: tuple[Path, ...], masks: tuple[Path, ...]) -> str | None:
    for kind, found in (("frames", frames), ("masks", masks)):
        if not found:
            return (
                f"{folder} is not a clip: expected {'PNG masks' if kind == 'masks' else 'images'} "
                f"in {folder / kind}, found {found_in(folder / kind)}"
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
