"""DAVIS: video object segmentation, in the folders of its 2016 and 2017 releases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import clips as folders
from cosettle_adapter.evaluation.clips import Clip, Masks, images_in, images_named, pick
from cosettle_adapter.evaluation.protocols import PUBLISHED, Propagation, Protocol, mask_protocol
from cosettle_adapter.video import FrameSelection

Year = Literal["2016", "2017"]
ALL_FRAMES = FrameSelection()
WHAT = "the folder of DAVIS that holds JPEGImages, Annotations and ImageSets"


def davis_clips(
    root: str | Path,
    *,
    year: Year | None = None,
    subset: str | None = None,
    resolution: str = "480p",
    clips: Sequence[str] | None = None,
    select: FrameSelection = ALL_FRAMES,
) -> list[Clip[Masks]]:
    """List clips with masks ``(T, H, W)`` uint8 of object ids, 0 the background, 255 void.

    The layout is ``JPEGImages/<resolution>/<clip>/*.jpg``,
    ``Annotations/<resolution>/<clip>/*.png`` and ``ImageSets/<year>/<subset>.txt``. The year, by
    default the newest there is, decides whether objects are merged into one (2016). The subset is
    by default val, or train where there is no list of val. Seconds of ``select`` are positions
    over ``fps`` (1).

    Raises:
        FrameError: a folder or list that should be there is not, or a clip that is not listed.
    """
    kinds = [f"JPEGImages/{resolution}", f"Annotations/{resolution}"]
    root = folders.data_folder(root, WHAT, [*kinds, "ImageSets"])
    year = year or newest_year(root)
    lists = [
        root / "ImageSets" / folder / f"{part}.txt"
        for part in ([subset] if subset else ["val", "train"])
        for folder in ([year] if year == "2017" else [year, "480p"])
    ]

    def make(name: str) -> Clip[Masks]:
        images, labels = (root / kind / name for kind in kinds)
        start, end, fps = select.start or 0, select.end or math.inf, select.fps or 1
        frames = [path for i, path in enumerate(images_in(images)) if start <= i / fps < end]
        frames = frames[:: select.every][: select.max_frames]
        masks = images_named(labels, [frame.stem for frame in frames], lossless=True)
        missing = [path for path in masks if not path.is_file()] if frames else [images / "*.jpg"]
        if missing:
            raise FrameError(
                f"no {missing[0]}; unpack the {resolution} archive of DAVIS again, or leave the "
                "clip out"
            )

        def read() -> Masks:
            found = folders.read_masks(masks)
            return (found > 0).astype(np.uint8) if year == "2016" else found

        return Clip(name, frames, read, tuple(range(len(frames))), (*frames, *masks))

    return folders.list_clips(f"DAVIS-{year} clip", root, folders.read_list(lists), clips, make)


def davis_protocol(
    *data: Path,
    clips: Sequence[str] | None = None,
    select: FrameSelection | Sequence[FrameSelection] = ALL_FRAMES,
    year: Year | None = None,
    propagation: Propagation = PUBLISHED,
) -> Protocol[Masks]:
    """Return the benchmark on DAVIS; several folders are parts of one evaluation.

    Clips of several are called ``<folder>/<clip>``, and ``clips`` may name them without the
    folder. ``select`` is one selection of frames for all folders or one for each.

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
            (f"{part}/{clip.name}", clip)
            for part, root, chosen in zip(parts, data, selections, strict=True)
            for clip in davis_clips(root, year=year, select=chosen)
        ]
        known = [name for full, clip in found for name in (full, clip.name)]
        wanted = set(pick(clips, known, f"clip {{}} in {', '.join(map(str, data))}"))
        return [dataclasses.replace(c, name=full) for full, c in found if wanted & {full, c.name}]

    settings: dict[str, Any] = {"year": year or newest_year(data[0])}
    for field in ("every", "max_frames", "start", "end", "fps"):
        values = [getattr(chosen, field) for chosen in selections]
        settings[field] = values[0] if len(set(values)) == 1 else values
    settings |= {"parts": parts} if parts else {}
    return mask_protocol("davis", listed, propagation, settings)


def newest_year(root: str | Path) -> Year:
    """Return the newest release that a folder of DAVIS has lists of."""
    return "2017" if (Path(root) / "ImageSets" / "2017").is_dir() else "2016"
