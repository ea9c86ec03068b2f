"""Reading DAVIS: the folders of its 2016 and 2017 releases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.evaluation.datasets.clips import MaskClip
from cosettle_adapter.evaluation.datasets.layout import (
    entries,
    existing_folder,
    pick,
    require_entries,
)
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WHAT = "the folder of DAVIS that holds JPEGImages, Annotations and ImageSets"


@dataclasses.dataclass(frozen=True)
class DavisSequence(MaskClip):
    """One clip of DAVIS, read when asked.

    Attributes:
        name: the clip's folder.
        frames: paths of its frames, in order.
        annotations: paths of its masks, one for every frame.
        merge: take all objects of a mask as one, as DAVIS-2016 does.
        problem: what is missing of it, or None; then reading raises it.
    """

    merge: bool

    def read_masks(self) -> NDArray[np.uint8]:
        """Read all masks: ``(T, H, W)`` uint8 object ids, 0 the background, 255 void.

        Raises:
            FrameError: the clip is not complete, or a mask that is damaged, not a palette or grey
                image, or of another size.
        """
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        masks = super().read_masks()
        return (masks > 0).astype(np.uint8) if self.merge else masks


def davis_sequences(
    root: str | Path,
    *,
    year: Literal["2016", "2017"] | None = None,
    subset: str | None = None,
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
    every: int = 1,
    max_frames: int | None = None,
) -> list[DavisSequence]:
    """List the clips of a DAVIS folder in the official layout; nothing is read but names.

    The layout is ``JPEGImages/<resolution>/<clip>/*.jpg``,
    ``Annotations/<resolution>/<clip>/*.png`` and ``ImageSets/<year>/<subset>.txt``.

    Args:
        root: the folder that holds ``JPEGImages`` and ``Annotations``.
        year: ``"2017"`` has several objects a clip, ``"2016"`` merges them into one; by default
            the newest that the folder has.
        subset: ``"val"`` or ``"train"``; by default val, or train where there is no list of val.
        resolution: ``"480p"`` or ``"Full-Resolution"``.
        sequences: names of the clips wanted; by default all of the subset.
        every: keep every n-th frame; other than 1, figures do not compare with published ones.
        max_frames: keep at most this many frames of a clip; likewise.

    Returns:
        The clips, in the order of ``sequences`` or of the subset's list. One of which files are
        missing has a ``problem`` and raises it when read.

    Raises:
        FrameError: a folder or list that should be there is not, or a clip that is not listed.
        ValueError: an option out of range.
    """
    if every < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            f"got every={every} and max_frames={max_frames}, expected at least 1 for both"
        )
    root = existing_folder(root, WHAT)
    require_entries(root, ["JPEGImages", "Annotations", "ImageSets"], WHAT)
    year = year or newest_year(root)
    if subset is None:
        held = [
            kind for kind in ("val", "train") if any(map(Path.is_file, _lists(root, year, kind)))
        ]
        subset = held[0] if held else "val"
    listed = _listed(root, year, subset)
    for kind in ("JPEGImages", "Annotations"):
        held = entries(root / kind)
        pick(resolution, held, f"{resolution} folder in {root / kind}; pass resolution= for others")
    for name in sequences or ():
        pick(name, listed, f"clip {name!r} in the {subset} subset of DAVIS-{year} in {root}")
    found = []
    for name in listed if sequences is None else sequences:
        pattern = root / "JPEGImages" / resolution / name / "*.jpg"
        frames = sorted(pattern.parent.glob(pattern.name))[::every][:max_frames]
        folder = root / "Annotations" / resolution / name
        annotations = [folder / f"{frame.stem}.png" for frame in frames]
        missing = next((path for path in annotations if not path.is_file()), None)
        problem = None
        if not frames or missing:
            problem = (
                f"DAVIS clip {name!r} is not complete: no {missing or pattern}; unpack the "
                f"{resolution} archive of DAVIS-{year} again, or leave the clip out of sequences"
            )
        found.append(
            DavisSequence(
                name, tuple(frames), tuple(annotations), merge=year == "2016", problem=problem
            )
        )
    return found


def newest_year(root: str | Path) -> Literal["2016", "2017"]:
    """Return the newest release that a folder of DAVIS has lists of."""
    if (Path(root) / "ImageSets" / "2017").is_dir():
        return "2017"
    return "2016"


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
