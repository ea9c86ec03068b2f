"""DAVIS: video object segmentation, in the folders of its 2016 and 2017 releases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.clips import (
    ALL_FRAMES,
    Clip,
    choose,
    data_folder,
    entries,
    files_named,
    images_in,
    label_maps_in,
    pick,
    read_masks,
)
from cosettle_adapter.evaluation.protocols import PUBLISHED, Propagation, Protocol, mask_protocol
from cosettle_adapter.video import FrameSelection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Masks = NDArray[np.uint8]

WHAT = "the folder of DAVIS that holds JPEGImages, Annotations and ImageSets"


def davis_clips(
    root: str | Path,
    *,
    year: Literal["2016", "2017"] | None = None,
    subset: str | None = None,
    resolution: str = "480p",
    clips: Sequence[str] | None = None,
    select: FrameSelection = ALL_FRAMES,
) -> list[Clip[Masks]]:
    """List the clips of a DAVIS folder in the official layout; nothing is read but names.

    The layout is ``JPEGImages/<resolution>/<clip>/*.jpg``,
    ``Annotations/<resolution>/<clip>/*.png`` and ``ImageSets/<year>/<subset>.txt``.

    Args:
        root: the folder that holds ``JPEGImages`` and ``Annotations``.
        year: ``"2017"`` has several objects a clip, ``"2016"`` merges them into one; by default
            the newest that the folder has.
        subset: ``"val"`` or ``"train"``; by default val, or train where there is no list of val.
        resolution: ``"480p"`` or ``"Full-Resolution"``.
        clips: names of the clips wanted; by default all of the subset.
        select: which frames; with fewer than all, figures do not compare with published ones.

    Returns:
        The clips, in the order of ``clips`` or of the subset's list. Annotations are masks
        ``(T, H, W)`` uint8 of object ids, 0 the background, 255 void.

    Raises:
        FrameError: a folder or list that should be there is not, or a clip that is not listed.
    """
    root = data_folder(root, WHAT, ["JPEGImages", "Annotations", "ImageSets"])
    year = year or newest_year(root)
    if subset is None:
        held = [
            kind for kind in ("val", "train") if any(map(Path.is_file, _lists(root, year, kind)))
        ]
        subset = held[0] if held else "val"
    listed = _listed(root, year, subset)
    for kind in ("JPEGImages", "Annotations"):
        pick([resolution], entries(root / kind), f"{{}} folder in {root / kind}; pass resolution=")
    names = pick(clips, listed, f"clip {{}} in the {subset} subset of DAVIS-{year} in {root}")
    merge = year == "2016"
    return [_clip(root, resolution, name, merge, select) for name in names]


def davis_protocol(
    *data: Path,
    clips: Sequence[str] | None = None,
    select: FrameSelection | Sequence[FrameSelection] = ALL_FRAMES,
    year: Literal["2016", "2017"] | None = None,
    propagation: Propagation = PUBLISHED,
) -> Protocol[Masks]:
    """Return the benchmark on DAVIS; several folders are parts of one evaluation.

    Args:
        *data: folders of DAVIS. Clips of several are called ``<folder>/<clip>``.
        clips: names of the clips wanted, with the folder or without.
        select: which frames, one selection for all folders or one for each.
        year: which release; by default the newest that the first folder has.
        propagation: how masks are propagated.

    Raises:
        ValueError: two folders of one name, or another number of selections.
    """
    selections = [select] if isinstance(select, FrameSelection) else list(select)
    selections = selections * len(data) if len(selections) == 1 else selections
    parts = [] if len(data) == 1 else [folder.resolve().name for folder in data]
    if len(selections) != len(data) or len(set(parts)) != len(parts):
        raise ValueError(
            f"got {len(data)} folders of DAVIS and {len(selections)} selections of frames; "
            "expected one for all or one for each, and folders of different names"
        )

    def listed() -> list[Clip[Masks]]:
        if not parts:
            return davis_clips(data[0], year=year, clips=clips, select=selections[0])
        found = [
            dataclasses.replace(clip, name=f"{part}/{clip.name}")
            for part, root, chosen in zip(parts, data, selections, strict=True)
            for clip in davis_clips(root, year=year, select=chosen)
        ]
        names = [{clip.name, clip.name.split("/")[-1]} for clip in found]
        where = f"clip {{}} in {', '.join(map(str, data))}"
        wanted = set(pick(clips, dict.fromkeys(name for each in names for name in each), where))
        return [clip for clip, each in zip(found, names, strict=True) if wanted & each]

    every = [chosen.every for chosen in selections]
    settings: dict[str, Any] = {
        "every": every[0] if len(set(every)) == 1 else every,
        "max_frames": selections[0].max_frames,
        "year": year or newest_year(data[0]),
    }
    rest = [(chosen.start, chosen.end, chosen.fps) for chosen in selections]
    settings |= {"seconds": rest} if any(any(each) for each in rest) else {}
    settings |= {"parts": parts} if parts else {}
    return mask_protocol("davis", listed, propagation, settings)


def newest_year(root: str | Path) -> Literal["2016", "2017"]:
    """Return the newest release that a folder of DAVIS has lists of."""
    return "2017" if (Path(root) / "ImageSets" / "2017").is_dir() else "2016"


def _clip(
    root: Path, resolution: str, name: str, merge: bool, select: FrameSelection
) -> Clip[Masks]:
    folder = root / "Annotations" / resolution / name
    images = root / "JPEGImages" / resolution / name
    frames = choose(images_in(images), select)
    stems = [frame.stem for frame in frames]
    masks = files_named(stems, label_maps_in(folder), folder / "*.png")
    missing = next((path for path in masks if not path.is_file()), None)
    problem = None
    if not frames or missing:
        problem = (
            f"DAVIS clip {name!r} is not complete: no {missing or images / '*.jpg'}; unpack the "
            f"{resolution} archive of DAVIS again, or leave the clip out"
        )

    def read() -> Masks:
        found = read_masks(masks)
        return (found > 0).astype(np.uint8) if merge else found

    annotated = tuple(range(len(frames)))
    return Clip(name, tuple(frames), read, annotated, (*frames, *masks), problem)


def _lists(root: Path, year: str, subset: str) -> list[Path]:
    folders = [year] if year == "2017" else [year, "480p"]
    return [root / "ImageSets" / folder / f"{subset}.txt" for folder in folders]


def _listed(root: Path, year: str, subset: str) -> list[str]:
    """Clip names of a subset; a line is a name, or the paths of a frame (DAVIS-2016's own)."""
    lists = _lists(root, year, subset)
    for path in lists:
        if path.is_file():
            named = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            names = [Path(entry).parent.name if "/" in entry else entry for entry in named]
            return list(dict.fromkeys(names))
    known = [Path(name).stem for path in lists for name in entries(path.parent)]
    raise FrameError(
        f"no DAVIS-{year} {subset} list in {root}: expected {' or '.join(map(str, lists))}."
        + did_you_mean(subset, known)
    )
