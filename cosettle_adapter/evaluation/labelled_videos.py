"""Videos in a folder for each class, and how they are split."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video import find_images, is_video
from cosettle_adapter.video.files import VIDEO_SUFFIXES

Part = Literal["train", "val"]
_VALIDATION = 0.25


@dataclasses.dataclass(frozen=True)
class LabelledVideo:
    """A video of a class.

    Attributes:
        path: a video file, or a folder of images.
        label: its class.
        name: path below the data folder, with forward slashes.
        part: the part it was given in, None where there are no parts.
    """

    path: Path
    label: str
    name: str
    part: Part | None = None

    def __str__(self) -> str:
        return self.name


def labelled_videos(root: str | os.PathLike[str]) -> list[LabelledVideo]:
    """List the videos of ``DIR/<class>/<video>``, or of ``DIR/train`` and ``DIR/val``.

    A video is a video file or a folder of images. When ``train`` and ``val`` are the only folders
    of ``root``, each is read as a folder of classes. Videos come in order of name.

    Raises:
        FrameError: no such folder, no classes, a class without videos, or a class of ``val``
            that ``train`` lacks.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FrameError(f"{root} is not a folder; expected {root.name}/<class>/<video>")
    if {folder.name for folder in _folders(root)} != {"train", "val"}:
        return _classes(root, root, None)
    train = _classes(root / "train", root, "train")
    val = _classes(root / "val", root, "val")
    missing = sorted({video.label for video in val} - {video.label for video in train})
    if missing:
        raise FrameError(
            f"{root / 'val'} has classes that {root / 'train'} lacks: {some_of(missing)}; give "
            "both the same classes"
        )
    return train + val


def split_videos(videos: Sequence[LabelledVideo], *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split videos into rows to learn from and rows to be judged by.

    A given split is kept. Otherwise a quarter of each class is judged, see :func:`held_out`.

    Raises:
        FrameError: a class with one video, or a given split with an empty part or with classes
            to be judged that there is nothing to learn from.
    """
    labels = [video.label for video in videos]
    given = any(video.part for video in videos)
    if given:
        val = [row for row, video in enumerate(videos) if video.part == "val"]
    else:
        lonely = sorted(label for label, count in Counter(labels).items() if count < 2)
        if lonely:
            raise FrameError(
                f"got a single readable video of {some_of(lonely)}, expected at least 2 a class: "
                "one to learn from, one to be judged by. Add videos or leave the class out"
            )
        names = [video.name for video in videos]
        val = held_out(names, labels, share=_VALIDATION, seed=seed)
    train = sorted(set(range(len(videos))) - set(val))
    unknown = sorted({labels[row] for row in val} - {labels[row] for row in train})
    if given and (not train or not val or unknown):
        raise FrameError(
            f"got {len(train)} videos to train on and {len(val)} to validate"
            + (f", and none to train on of {some_of(unknown)}" if unknown else "")
            + "; both parts need readable videos of the same classes"
        )
    return train, val


def held_out(names: Sequence[str], labels: Sequence[str], *, share: float, seed: int) -> list[int]:
    """Choose rows of every class: the nearest to ``share`` of it, at least one, never all.

    Classes of one row give none. Which rows depends on names and seed alone, not on order or
    platform, and a video that is added or missing moves few others.
    """
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        by_label[label].append(row)
    chosen: list[int] = []
    for rows in by_label.values():
        if len(rows) > 1:
            rows.sort(key=lambda row: hashlib.sha256(f"{seed}/{names[row]}".encode()).digest())
            chosen += rows[: min(max(1, math.floor(share * len(rows) + 0.5)), len(rows) - 1)]
    return sorted(chosen)


def some_of(names: Iterable[str]) -> str:
    """Quote the first few names and count the rest."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _classes(folder: Path, root: Path, part: Part | None) -> list[LabelledVideo]:
    videos = []
    for label in _folders(folder):
        found = [path for path in sorted(label.iterdir()) if _holds_video(path)]
        if not found:
            raise FrameError(
                f"{label} holds no videos: expected video files ({', '.join(VIDEO_SUFFIXES)}) or "
                "folders of images. Fill the folder or remove it"
            )
        videos += [
            LabelledVideo(path, label.name, path.relative_to(root).as_posix(), part)
            for path in found
        ]
    if not videos:
        raise FrameError(
            f"{folder} has no folders; expected one for each class, {folder.name}/<class>/<video>"
        )
    return videos


def _holds_video(path: Path) -> bool:
    if path.is_dir():
        return not path.name.startswith(".") and bool(find_images(path))
    return is_video(path)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
