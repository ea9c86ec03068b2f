"""Videos found on disk, and the search of a folder for them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cosettle_adapter.errors import FrameError
from cosettle_adapter.training.corpora.shards import SHARD_SUFFIX, index_shard
from cosettle_adapter.video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES


@dataclass(frozen=True, slots=True)
class Found:
    """A video, before it has a name.

    Attributes:
        path: of a video file, a folder of images, or the archive it lies in.
        base: the folder that its name is told from.
        start: first byte in the archive.
        size: bytes in the archive, or None.
        member: name in the archive.
        frames: number of images in the folder, where an index tells.
        real: path without links, if links lead to it from ``base``.
    """

    path: str
    base: str
    start: int = 0
    size: int | None = None
    member: str = ""
    frames: int | None = None
    real: str = ""


@dataclass
class Discovery:
    """What was found.

    Attributes:
        videos: in order; those of a folder by name, those of a list as listed.
        problems: shards and folders that could not be read, and why.
        others: how often a kind of file was met that is no video, with an example of each.
    """

    videos: list[Found] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def add_shard(self, path: str, base: str) -> None:
        """Add the videos of a shard, or what is wrong with it."""
        try:
            videos, problem = index_shard(Path(path))
        except FrameError as error:
            self.problems.append((path, str(error)))
            return
        if problem:
            self.problems.append((path, problem))
        self.videos += [Found(path, base, video.start, video.size, video.name) for video in videos]

    def add_folder(self, root: str) -> None:
        """Add what lies below a folder, in order of name."""
        before = len(self.videos)
        real = os.path.realpath(root)
        _Walk(self, root, real).enter(root, real)
        self.videos[before:] = sorted(
            self.videos[before:], key=lambda video: (video.path.replace(os.sep, "/"), video.start)
        )


class _Walk:
    """A search of one folder that comes to every place once, whatever links there are."""

    def __init__(self, found: Discovery, root: str, real_root: str) -> None:
        self._found, self._root, self._real_root = found, root, real_root
        self._linked: set[str] = set()

    def enter(self, folder: str, real: str) -> bool:
        """Add what lies below a folder; tell whether anything did."""
        try:
            names = os.listdir(folder)  # noqa: PTH208  # by far the fastest way
        except OSError as error:
            problem = f"the folder cannot be read ({error.strerror or error})"
            self._found.problems.append((folder, problem))
            return False
        names = [name for name in names if not name.startswith(".")]
        images = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        below = images < len(names) and self._look_at(folder, real)
        # images beside videos are previews of them; images beside notes are frames
        if images and not below:
            self._add(folder, real)
        return below or images > 0

    def _look_at(self, folder: str, real: str) -> bool:
        below = False
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
            if not entry.is_dir():
                below |= self._add_file(entry.path, target)
            elif not entry.is_symlink():
                below |= self.enter(entry.path, target)
            elif target not in self._linked and not self._is_inside(target):
                self._linked.add(target)
                below |= self.enter(entry.path, target)
        return below

    def _add_file(self, path: str, real: str) -> bool:
        lowered = path.lower()
        if lowered.endswith(VIDEO_SUFFIXES):
            self._add(path, real)
        elif lowered.endswith(SHARD_SUFFIX):
            self._found.add_shard(path, self._root)
        else:
            if not lowered.endswith(IMAGE_SUFFIXES):
                self._found.others[path.rpartition("/")[2]] += 1
            return False
        return True

    def _add(self, path: str, real: str) -> None:
        plain = real == f"{self._real_root}{path[len(self._root) :]}"
        self._found.videos.append(Found(path, self._root, real="" if plain else real))

    def _is_inside(self, target: str) -> bool:
        return f"{target}/".startswith(f"{self._real_root}/")
