"""Videos in a folder for each class, and how they are split."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import data_folder, entries, few, images_in
from cosettle_adapter.video import is_video
from cosettle_adapter.video.files import VIDEO_SUFFIXES

Part = Literal["train", "val"]
_VALIDATION = 0.25


@dataclasses.dataclass(frozen=True)
class LabelledVideo:
    """A video of a class."""

    path: Path  # a video file, or a folder of images
    label: str
    name: str  # path below the data folder, with forward slashes
    part: Part | None = None  # if the folder has these parts

    def __str__(self) -> str:
        return self.name


def labelled_videos(root: str | os.PathLike[str]) -> list[LabelledVideo]:
    """List the videos of ``DIR/<class>/<video>``, or of ``DIR/train`` and ``DIR/val``.

    A video is a video file or a folder of images. When ``train`` and ``val`` are the only folders
    of ``root``, each is read as a folder of classes. Videos come in order of name.

    Raises:
        FrameError: no classes, or a class without videos.
    """
    root = data_folder(Path(root), "a folder of <class>/<video>")
    if {folder.name for folder in _folders(root)} == {"train", "val"}:
        return _classes(root / "train", root, "train") + _classes(root / "val", root, "val")
    return _classes(root, root, None)


def split_videos(videos: Sequence[LabelledVideo], *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split videos into rows to learn from and rows to be judged by.

    A given split is kept. Otherwise a quarter of each class is judged, see :func:`held_out`.

    Raises:
        FrameError: a class that there is nothing to learn from, or nothing to be judged by.
    """
    labels = [video.label for video in videos]
    given = any(video.part for video in videos)
    if given:
        val = [row for row, video in enumerate(videos) if video.part == "val"]
    else:
        val = held_out([video.name for video in videos], labels, share=_VALIDATION, seed=seed)
    train = sorted(set(range(len(videos))) - set(val))
    learnt, judged = ({labels[row] for row in rows} for rows in (train, val))
    lacking = sorted(map(repr, judged - learnt if given else learnt - judged))
    if not train or not val or lacking:
        few_videos = "no readable video to learn from of" if given else "a single readable video of"
        raise FrameError(
            f"got {len(train)} videos to learn from and {len(val)} to be judged by"
            + (f", and {few_videos} {few(lacking)}" if lacking else "")
            + "; expected both of every class: add videos or leave the class out"
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


def _classes(folder: Path, root: Path, part: Part | None) -> list[LabelledVideo]:
    videos = []
    for label in _folders(folder):
        paths = [label / name for name in entries(label)]
        found = [path for path in paths if images_in(path) or (path.is_file() and is_video(path))]
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


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in entries(folder) if (folder / name).is_dir()]
