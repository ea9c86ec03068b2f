"""Which sources the things a user typed mean: a video, a folder of images, or many of either."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_key, resolve


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to extract features of.

    Attributes:
        path: what :func:`open_frames` takes: a file, a folder of images, or a pattern of images.
        kind: a video, or images.
        name: what its output may be called after: relative to the folder it was found in.
    """

    path: str
    kind: Literal["video", "images"]
    name: PurePosixPath

    @property
    def location(self) -> Path:
        """Absolute path, by which the same thing typed twice is known."""
        return Path(self.path).expanduser().absolute()


def find_sources(given: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Find what files, folders and patterns mean, each once, in the order given.

    A folder that holds images is one source. A folder that holds videos, at any depth, is as many;
    one that holds neither, but folders of images below it, is as many as those. Hidden files are
    passed over. Nothing is opened.

    Raises:
        FrameError: no such thing, nothing usable in it, or images beside videos.
    """
    found = {source.location: source for each in given for source in _find(os.fspath(each))}
    return list(found.values())


def understood(sources: Sequence[Source]) -> str:
    """Say in words what was found: ``3 videos and 1 folder of images``."""
    videos = sum(source.kind == "video" for source in sources)
    images = len(sources) - videos
    told = [f"{videos} video{'s' * (videos != 1)}"] if videos else []
    if images:
        told.append(f"{images} {'sequence' if images == 1 else 'sequences'} of images")
    return " and ".join(told)


def _find(text: str) -> Iterator[Source]:
    path = Path(text).expanduser()
    if path.is_dir():
        yield from _in_folder(path)
    elif not path.exists() and glob.has_magic(text):
        yield from _matching(text)
    else:
        found = resolve(text)
        kind: Literal["video", "images"] = "video" if isinstance(found, Path) else "images"
        yield Source(text, kind, PurePosixPath(path.name))


def _in_folder(root: Path) -> Iterator[Source]:
    files = sorted(_visible_files(root), key=lambda file: natural_key(file.as_posix()))
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    own_images = [file for file in images if file.parent == root]
    if own_images and videos:
        raise FrameError(
            f"{root} holds images ({own_images[0].name}) beside videos ({videos[0].name}): is it "
            f"one source or many? Give '{root}/*{own_images[0].suffix}' for the images as one "
            f"source, or '{root}/*{videos[0].suffix}' for the videos"
        )
    if own_images:
        yield Source(str(root), "images", PurePosixPath(root.resolve().name or "images"))
    elif videos:
        for file in videos:
            yield Source(str(file), "video", PurePosixPath(file.relative_to(root).as_posix()))
    elif images:
        for folder in dict.fromkeys(file.parent for file in images):
            name = PurePosixPath(folder.relative_to(root).as_posix())
            yield Source(str(folder), "images", name)
    else:
        raise FrameError(
            f"{root} holds neither videos ({', '.join(VIDEO_SUFFIXES)}) nor images "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )


def _matching(pattern: str) -> Iterator[Source]:
    expanded = os.path.expanduser(pattern)  # noqa: PTH111  # a pattern is no path
    names = glob.glob(expanded, recursive=True)  # noqa: PTH207  # it knows "**" and dots
    paths = [Path(name) for name in sorted(names, key=natural_key)]
    if not paths:
        raise FrameError(f"pattern {pattern} matches nothing; folders in it must exist")
    if all(path.suffix.lower() in IMAGE_SUFFIXES for path in paths):
        yield Source(pattern, "images", PurePosixPath(paths[0].parent.resolve().name or "images"))
        return
    usable = [p for p in paths if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    if not usable:
        raise FrameError(
            f"pattern {pattern} matches {paths[0]} and the like, which are neither videos "
            f"({', '.join(VIDEO_SUFFIXES)}) nor all images ({', '.join(IMAGE_SUFFIXES)})"
        )
    for path in usable:
        if path.is_dir():
            yield from _in_folder(path)
        else:
            yield Source(str(path), "video", PurePosixPath(path.name))


def _visible_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(folder, name)
