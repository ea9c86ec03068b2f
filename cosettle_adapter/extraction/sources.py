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
from cosettle_adapter.extraction.settings import ExtractionError
from cosettle_adapter.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_images, find_videos
from cosettle_adapter.video.files import is_image, is_video, natural_key, resolve

Item = TypeVar("Item")

# what launchers tell the processes they start: which one, of how many, which on its machine
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to extract features of."""

    path: str  # a file, a folder of images, or a pattern of images
    kind: Literal["video", "images"]
    name: PurePosixPath  # relative to the folder it was found in: what its output is called after

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
    spellings = [_spellings(source, number) for number, source in enumerate(sources, 1)]
    names = [next(each) for each in spellings]
    while len({name.casefold() for name in names}) < len(names):
        counts = Counter(name.casefold() for name in names)
        names = [
            next(longer) if counts[name.casefold()] > 1 else name
            for name, longer in zip(names, spellings, strict=True)
        ]
    return names


@dataclasses.dataclass(frozen=True)
class Shard:
    """A share of the sources: every ``count``-th, from ``index`` (0-based) on."""

    index: int = 0
    count: int = 1
    local: int = 0  # index among the processes of this machine
    given_by: str = "--shard"  # or a variable of the launcher

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ExtractionError(
                f"{self.given_by} says shard {self.index} of {self.count}; shards are counted from "
                f"0, so 0/{max(self.count, 1)} is the first"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``0/4``, the first of four; raises :class:`ExtractionError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ExtractionError(f"expected a shard such as 0/4, the first of four, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Shard:
        """Return the share that ``torchrun`` or ``srun`` gave this process; all without either."""
        for rank, size, local in _LAUNCHERS:
            if rank in variables and size in variables:
                index = int(variables[rank])
                return cls(index, int(variables[size]), int(variables.get(local, index)), rank)
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
    elif path.exists() or not glob.has_magic(text):
        kind: Literal["video", "images"] = "video" if isinstance(resolve(text), Path) else "images"
        yield Source(text, kind, PurePosixPath(path.name))
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # it knows "**" and dots
        paths = [Path(name) for name in sorted(names, key=natural_key)]
        usable = [each for each in paths if each.is_dir() or is_video(each)]
        if paths and all(map(is_image, paths)):
            folder = PurePosixPath(paths[0].parent.resolve().name or "images")
            yield Source(text, "images", folder)
        elif not usable:
            found = f"{paths[0]}, but neither {_kinds()}" if paths else "nothing"
            raise FrameError(f"pattern {text} matches {found}")
        for each in usable:
            yield from _find(str(each))


def _in_folder(root: Path) -> Iterator[Source]:
    images, videos = find_images(root), find_videos(root, recursive=True)
    if images and videos:
        raise FrameError(
            f"{root} holds images ({images[0].name}) beside videos ({videos[0].name}): is it "
            f"one source or many? Give '{root}/*{images[0].suffix}' for the images as one "
            f"source, or '{root}/*{videos[0].suffix}' for the videos"
        )
    if images:
        yield Source(str(root), "images", PurePosixPath(root.resolve().name or "images"))
        return
    below = dict.fromkeys(image.parent for image in find_images(root, recursive=True))
    if not videos and not below:
        raise FrameError(f"{root} holds neither {_kinds()}")
    for path in videos or below:
        name = PurePosixPath(path.relative_to(root).as_posix())
        yield Source(str(path), "video" if videos else "images", name)


def _kinds() -> str:
    return f"videos ({', '.join(VIDEO_SUFFIXES)}) nor images ({', '.join(IMAGE_SUFFIXES)})"


def _spellings(source: Source, number: int) -> Iterator[str]:
    """Names for an output, each longer than the one before it."""
    plain = source.name.with_suffix("") if source.kind == "video" else source.name
    outside = source.location.parts[1 : -len(source.name.parts)]
    for above in range(len(outside) + 1):
        folders = outside[len(outside) - above :]
        yield str(PurePosixPath(*folders, plain))
        yield str(PurePosixPath(*folders, source.name))
    yield f"{plain}-{number}"  # the very same path but for capital letters
