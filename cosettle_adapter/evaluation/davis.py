"""Reading DAVIS: the folders of its 2016 and 2017 releases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class DavisSequence:
    """One clip of DAVIS, read when asked.

    Attributes:
        name: the clip's folder.
        frames: paths of its frames, in order.
        annotations: paths of its masks, one for every frame.
        merge: take all objects of a mask as one, as DAVIS-2016 does.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    merge: bool

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read one frame: ``(H, W, 3)`` uint8, RGB."""
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        image: Any = require("PIL.Image", extra="eval", purpose="reading DAVIS")
        with image.open(self.frames[index]) as opened:
            frame: NDArray[np.uint8] = np.asarray(opened.convert("RGB"))
        return frame

    def read_masks(self) -> NDArray[np.uint8]:
        """Read all masks: ``(T, H, W)`` uint8 object ids, 0 the background, 255 void.

        Raises:
            FrameError: a mask that is not a palette or grey image, or of another size.
        """
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        masks = [self._read_mask(path) for path in self.annotations]
        for path, mask in zip(self.annotations, masks, strict=True):
            if mask.shape != masks[0].shape:
                raise FrameError(
                    f"{path} is {mask.shape[0]} x {mask.shape[1]}, but the sequence's first mask "
                    f"is {masks[0].shape[0]} x {masks[0].shape[1]}; all must have one size"
                )
        stacked: NDArray[np.uint8] = np.stack(masks)
        return (stacked > 0).astype(np.uint8) if self.merge else stacked

    def _read_mask(self, path: Path) -> NDArray[np.uint8]:
        np: Any = require("numpy", extra="eval", purpose="reading DAVIS")
        image: Any = require("PIL.Image", extra="eval", purpose="reading DAVIS")
        with image.open(path) as opened:
            if opened.mode not in ("P", "L", "1"):
                raise FrameError(
                    f"{path} is a {opened.mode} image, expected a palette (P) or grey (L) PNG "
                    "whose values are object ids; take DAVIS's own annotations"
                )
            mask: NDArray[np.uint8] = np.asarray(opened).astype(np.uint8)
        return mask


def davis_sequences(
    root: str | Path,
    *,
    year: Literal["2016", "2017"] | None = None,
    subset: str = "val",
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
        subset: ``"val"`` or ``"train"``.
        resolution: ``"480p"`` or ``"Full-Resolution"``.
        sequences: names of the clips wanted; by default all of the subset.
        every: keep every n-th frame; other than 1, figures do not compare with published ones.
        max_frames: keep at most this many frames of a clip; likewise.

    Returns:
        The clips, in the order of ``sequences`` or of the subset's list.

    Raises:
        FrameError: a folder, list, clip or annotation that should be there is not.
        ValueError: an option out of range.
    """
    if every < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            f"got every={every} and max_frames={max_frames}, expected at least 1 for both"
        )
    root = Path(root)
    year = year or _newest(root)
    listed = _listed(root, year, subset)
    for name in sequences or ():
        if name not in listed:
            raise FrameError(
                f"no clip {name!r} in the {subset} subset of DAVIS-{year} in {root}."
                + (did_you_mean(name, listed) or f" It has {len(listed)}: {', '.join(listed[:9])}")
            )
    found = []
    for name in listed if sequences is None else sequences:
        pattern = root / "JPEGImages" / resolution / name / "*.jpg"
        frames = sorted(pattern.parent.glob(pattern.name))[::every][:max_frames]
        folder = root / "Annotations" / resolution / name
        annotations = [folder / f"{frame.stem}.png" for frame in frames]
        missing = next((path for path in annotations if not path.is_file()), None)
        if not frames or missing:
            raise FrameError(
                f"DAVIS clip {name!r} is not complete: no {missing or pattern}; unpack the "
                f"{resolution} archive of DAVIS-{year} again, or leave the clip out of sequences"
            )
        found.append(DavisSequence(name, tuple(frames), tuple(annotations), merge=year == "2016"))
    return found


def _newest(root: Path) -> Literal["2016", "2017"]:
    if (root / "ImageSets" / "2017").is_dir():
        return "2017"
    return "2016"


def _listed(root: Path, year: str, subset: str) -> list[str]:
    """Clip names of a subset; a line is a name, or the paths of a frame (DAVIS-2016's own)."""
    lists = [root / "ImageSets" / year / f"{subset}.txt"]
    if year == "2016":
        lists.append(root / "ImageSets" / "480p" / f"{subset}.txt")
    for path in lists:
        if path.is_file():
            entries = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            names = [Path(entry).parent.name if "/" in entry else entry for entry in entries]
            return list(dict.fromkeys(names))
    raise FrameError(
        f"no DAVIS-{year} {subset} list in {root}: expected {' or '.join(map(str, lists))}; give "
        "the folder that holds JPEGImages, Annotations and ImageSets"
    )
