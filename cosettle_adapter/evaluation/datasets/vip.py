"""Reading VIP (video instance-level human parsing): 20 classes of body parts and clothes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.datasets.clips import MaskClip
from cosettle_adapter.evaluation.datasets.layout import (
    entries,
    existing_folder,
    few,
    found_in,
    images_in,
    pick,
    require_entries,
)

VIP_CLASSES = 20  # the background is 0
WHAT = "the folder VIP_Fine, with Images, Annotations/Category_ids and lists"


@dataclasses.dataclass(frozen=True)
class VipClip(MaskClip):
    """One clip of VIP, read when asked; its label maps are classes 0 to 19, 0 the background."""


def vip_clips(
    root: str | Path, *, subset: str = "val", videos: Sequence[str] | None = None
) -> list[VipClip]:
    """List the clips of VIP in the official layout; nothing is read but names.

    The layout is that of the archive VIP_Fine: ``Images/<video>/*.jpg``,
    ``Annotations/Category_ids/<video>/*.png`` (or ``Category_ids/<video>/*.png``) and
    ``lists/<subset>_videos.txt`` with a video a line. Its frames are 25 apart. Lists of frames,
    ``lists/<subset>_id.txt`` with ``<video>/<frame>`` a line, serve as well.

    Args:
        root: the folder that holds ``Images``.
        subset: ``"val"`` (50 videos) or ``"train"``.
        videos: names of the videos wanted; by default all of the subset, with which no list is
            needed.

    Returns:
        The clips, in the order of ``videos`` or of the list. One of which files are missing has a
        ``problem`` and raises it when read.

    Raises:
        FrameError: a folder or list that should be there is not, or a video that does not exist.
    """
    root = existing_folder(root, WHAT)
    require_entries(root, ["Images"], WHAT)
    labels = root / "Annotations" / "Category_ids"
    if not labels.is_dir():
        labels = root / "Category_ids"
    if not labels.is_dir():
        require_entries(root, ["Annotations/Category_ids"], WHAT)
    for name in videos or ():
        pick(name, entries(root / "Images"), f"video {name!r} in {root / 'Images'}")
    listed = _listed(root, subset) if videos is None else list(videos)
    return [_clip(root / "Images" / name, labels / name) for name in listed]


def _clip(images: Path, labels: Path) -> VipClip:
    frames = images_in(images)
    masks = tuple(path for path in images_in(labels) if path.suffix.lower() == ".png")
    stems = {frame.stem for frame in frames}
    strangers = [path.name for path in masks if path.stem not in stems]
    problem = None
    if not frames:
        problem = f"VIP video {images.name!r} has no frames: {images} holds {found_in(images)}"
    elif not masks:
        problem = f"VIP video {images.name!r} has no PNG masks: {labels} holds {found_in(labels)}"
    elif strangers:
        problem = (
            f"VIP video {images.name!r} has masks without a frame in {images}: {few(strangers)}"
        )
    elif masks[0].stem != frames[0].stem:
        problem = (
            f"VIP video {images.name!r} has no mask for its first frame {frames[0].name}, expected "
            f"{labels / (frames[0].stem + '.png')}"
        )
    return VipClip(images.name, frames, masks, problem=problem)


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
        f"{found_in(root / 'lists')} in lists; without one, pass videos=."
        + did_you_mean(subset, known)
    )


def _video(entry: str) -> str:
    """The video of a list's entry: its name, the path of its folder, or that of a frame."""
    parts = Path(entry).parts
    is_frame = len(parts) > 1 and Path(parts[-1]).stem.isdigit()
    return parts[-2] if is_frame else parts[-1]
