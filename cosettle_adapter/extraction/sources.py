"""Many sources: which are meant, what their outputs are called, and whose share they are."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import torch

from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction.errors import ExtractionError
from cosettle_adapter.video.files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_image,
    is_video,
    natural_key,
    resolve,
)

Item = TypeVar("Item")

# what launchers tell the processes they start: which one, of how many, which on its machine
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to extract features of.

    Attributes:
        path: what :func:`~cosettle_adapter.video.open_frames` takes: a file, a folder of images, or
            a pattern of images.
        kind: a video, or images.
        name: what its output may be called after: relative to the folder it was found in.
    """

    path: str
    kind: Literal["video", "images"]
    name: PurePosixPath

    @property
    def location(self) -> Path:
        """Absolute path, by which the same source given twice is recognised."""
        return Path(self.path).expanduser().absolute()


def find_sources(given: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Find what files, folders and patterns mean, each once, in the order given.

    A folder of images is one source. A folder that holds videos, at any depth, is as many; one
    that holds neither, but folders of images below it, is as many as those. Hidden files are
    ignored. Nothing is opened.

    Raises:
        FrameError: no such thing, nothing usable in it, or images beside videos.
    """
    found = {source.location: source for each in given for source in _find(os.fspath(each))}
    return list(found.values())


def output_names(sources: Sequence[Source]) -> list[str]:
    """Name outputs after their sources, relative to the output folder and without a suffix.

    ``clip.mp4`` becomes ``clip``. Where names coincide, also but for capital letters, the source's
    suffix is kept (``clip.mp4``), then the folders it lies in are put in front (``morning/clip``),
    until they differ. A name depends on the sources alone.
    """
    levels = [0] * len(sources)
    while True:
        names = [_output_name(*numbered, levels[numbered[0]]) for numbered in enumerate(sources)]
        counts = Counter(name.casefold() for name in names)
        ambiguous = [index for index, name in enumerate(names) if counts[name.casefold()] > 1]
        if not ambiguous:
            return names
        for index in ambiguous:
            levels[index] += 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """A share of the sources: every ``count``-th, from ``index`` on.

    Attributes:
        index: 0-based.
        count: number of shards.
        local: index among the processes of this machine.
        given_by: ``--shard`` or a variable of the launcher.

    Raises:
        ExtractionError: an index that is not below the count.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    given_by: str = "--shard"

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ExtractionError(
                f"{self.given_by} says shard {self.index} of {self.count}; shards are counted from "
                f"0, so 0/{max(self.count, 1)} is the first"
            )

    @property
    def ends_together(self) -> bool:
        """Whether the launcher ends all processes when one fails, as ``torchrun`` does."""
        return self.given_by == "RANK"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``0/4``: the first of four.

        Raises:
            ExtractionError: anything else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ExtractionError(f"expected a shard such as 0/4, the first of four, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Shard:
        """Return the share that ``torchrun`` or ``srun`` gave this process; all without either."""
        variables = os.environ if variables is None else variables
        for rank, size, local in _LAUNCHERS:
            if rank in variables and size in variables:
                index = int(variables[rank])
                local_index = int(variables.get(local, index))
                return cls(index, int(variables[size]), local_index, rank)
        return cls()

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this shard's items."""
        return list(items[self.index :: self.count])

    def device(self, name: str) -> str:
        """Return this process's device: ``cuda`` becomes one GPU a process."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"


def _find(text: str) -> Iterator[Source]:
    path = Path(text).expanduser()
    if path.is_dir():
        yield from _in_folder(path)
    elif not path.exists() and glob.has_magic(text):
        yield from _matching(text)
    else:
        kind: Literal["video", "images"] = "video" if isinstance(resolve(text), Path) else "images"
        yield Source(text, kind, PurePosixPath(path.name))


def _in_folder(root: Path) -> Iterator[Source]:
    files = sorted(_visible_files(root), key=lambda file: natural_key(file.as_posix()))
    videos = [file for file in files if is_video(file)]
    images = [file for file in files if is_image(file)]
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
        raise FrameError(f"{root} holds neither {_kinds()}")


def _matching(pattern: str) -> Iterator[Source]:
    expanded = os.path.expanduser(pattern)  # noqa: PTH111  # a pattern is no path
    names = glob.glob(expanded, recursive=True)  # noqa: PTH207  # it knows "**" and dots
    paths = [Path(name) for name in sorted(names, key=natural_key)]
    if not paths:
        raise FrameError(f"pattern {pattern} matches nothing; folders in it must exist")
    if all(map(is_image, paths)):
        yield Source(pattern, "images", PurePosixPath(paths[0].parent.resolve().name or "images"))
        return
    usable = [path for path in paths if path.is_dir() or is_video(path)]
    if not usable:
        raise FrameError(f"pattern {pattern} matches {paths[0]}, but neither {_kinds()}")
    for path in usable:
        if path.is_dir():
            yield from _in_folder(path)
        else:
            yield Source(str(path), "video", PurePosixPath(path.name))


def _visible_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _kinds() -> str:
    return f"videos ({', '.join(VIDEO_SUFFIXES)}) nor images ({', '.join(IMAGE_SUFFIXES)})"


def _output_name(index: int, source: Source, level: int) -> str:
    above, with_suffix = divmod(level, 2)
    name = source.name
    if source.kind == "video" and not with_suffix:
        name = name.with_suffix("")
    outside = source.location.parts[1 : -len(source.name.parts)]
    if above > len(outside):  # the very same path but for capital letters
        return f"{name}-{index + 1}"
    return str(PurePosixPath(*outside[len(outside) - above :], name))
