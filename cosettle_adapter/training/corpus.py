"""A corpus: the videos to train on, found by name and read a few frames at a time.

Training reads single frames of single videos in random order, so WebDataset shards are accessed
through the byte offsets of their members; the ``webdataset`` library reads shards front to back.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.errors import CosettleError, FrameError, did_you_mean
from cosettle_adapter.imports import require
from cosettle_adapter.video.decoder import decode_video
from cosettle_adapter.video.files import is_image, is_video, natural_key, read_image
from cosettle_adapter.video.random_access import count_frames, read_frames
from cosettle_adapter.video.reader import damage, pending_frames
from cosettle_adapter.video.selection import LostFrames, PendingFrame
from cosettle_adapter.video.sources import FileRange, VideoSource

Places = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_SHARD = ".tar"
_LISTS = (".csv", ".lst", ".txt", ".tsv")
_EXPECTED = (
    "a folder of videos or of folders of images, a list of paths (.txt or .csv), a pattern such as "
    "'clips/*.mp4', or shards such as 'shards-{000..009}.tar', not compressed"
)
_COLUMNS = re.compile(r"[,\t]|(?:\s+\d+)+$")  # separates a path from further columns
_COLUMN_NAMES = {"file", "filename", "name", "path", "video", "video_path"}
_PATHS_CHECKED = 1000


class Video(NamedTuple):
    """A video file, a folder of images, or a member of a shard; unreadable: :class:`FrameError`."""

    name: str  # unique path relative to the corpus, with forward slashes
    source: VideoSource

    def length(self) -> int:
        """Count the frames, without decoding them."""
        with self._named():
            images = self._images()
            return count_frames(self.source, verify=False) if images is None else len(images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the frames at 0-based ``indices`` in that order, ``(T, 3, H, W)`` uint8."""
        with self._named():
            images = self._images()
            if images is None:
                return read_frames(self.source, indices, verify=False)
            frames = {index: read_image(images[index]) for index in set(indices)}
            if len({frame.shape for frame in frames.values()}) > 1:
                raise FrameError(
                    f"the images in {self.source} have different sizes; expected one size"
                )
            return torch.stack([frames[index] for index in indices])

    def frames(self) -> Generator[PendingFrame, None, None]:
        """Yield all frames in order, with times in seconds (of images: their indices)."""
        with self._named():
            images = self._images()
            items = decode_video(self.source) if images is None else pending_frames(images)
            with contextlib.closing(items):
                for item in items:
                    if isinstance(item, LostFrames):
                        raise FrameError(f"{self.name} {damage(item.times, item.reason)}")
                    yield item

    def size(self) -> int:
        """Return the size of a video file in bytes, or -1 for a folder or a missing file."""
        if isinstance(self.source, FileRange):
            return self.source.size
        return self.source.stat().st_size if self.source.is_file() else -1

    def _images(self) -> list[Path] | None:
        if isinstance(self.source, FileRange) or not self.source.is_dir():
            return None
        names = filter(is_image, os.listdir(self.source))  # noqa: PTH208  # by far the fastest
        images = [self.source / name for name in sorted(names, key=natural_key)]
        if not images:
            raise FrameError(f"{self.source} is a folder without images")
        return images

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn any error of a decoder into a :class:`FrameError` that names the video."""
        try:
            yield
        except CosettleError:
            raise
        except Exception as error:
            problem = f"{self.name} cannot be read ({type(error).__name__}: {error})"
            raise FrameError(problem) from error


class Corpus:
    """Videos in a fixed order; ``problems`` lists unreadable shards and folders with reasons."""

    def __init__(self, videos: Iterable[Video], problems: Iterable[tuple[str, str]] = ()) -> None:
        self.videos, self.problems = tuple(videos), tuple(problems)

    @classmethod
    def open(cls, data: Places) -> Corpus:
        """Find videos by listing folders and reading shard headers; decodes nothing.

        Args:
            data: one or several of: a folder, searched recursively for video files, WebDataset
                shards and folders of images (each is one video, in natural order); a ``.txt`` or
                ``.csv`` file that lists paths (see :func:`read_list`); a pattern, also with
                braces, ``shards-{000..009}.tar``; a single video or shard.

        Raises:
            FrameError: one of them does not exist, or holds no videos.
        """
        search, places = _Search(), [data] if isinstance(data, (str, os.PathLike)) else data
        for place in places:
            search.add(os.fspath(place))
        if not search.sources:
            raise FrameError(f"no data given; expected {_EXPECTED}")
        return cls(search.videos(), search.problems)

    def __len__(self) -> int:
        return len(self.videos)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over names and file sizes in order; does not read the files."""
        lines = (f"{video.name}\0{video.size()}\n" for video in self.videos)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Search:
    """Collects videos, each with its base folder."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        self.sources: list[tuple[Path, VideoSource]] = []
        self._others: list[str] = []  # names of files that are not videos

    def videos(self) -> Iterator[Video]:
        """Yield each video once, named by its path relative to the common parent of all bases."""
        common = os.path.commonpath([base for base, _ in self.sources])
        seen: set[tuple[str, int]] = set()
        for _, source in self.sources:
            path, start, member = Path(str(source)), 0, ""
            if isinstance(source, FileRange):
                path, start, member = source.path, source.start, f"/{source.name}"
            location = (os.path.realpath(path), start)
            if location in seen:
                continue
            seen.add(location)
            name = os.path.relpath(path, common)
            if name.startswith(os.curdir):  # the base itself, or a listed path outside of it
                name = path.name if name == os.curdir else str(path).lstrip(os.sep)
            if member:
                name = f"{name.removesuffix(_SHARD)}{member}"
            yield Video(name.replace(os.sep, "/"), source)

    def add(self, text: str) -> None:
        """Add the videos of one argument: a path, pattern or list."""
        count = len(self.sources)
        for path in _paths_of(text):
            if path.is_dir():
                self._add_folder(path)
            elif path.suffix.lower() in _LISTS:
                for listed in read_list(path):
                    self._add_file(listed, path.parent, listed=True)
            else:
                self._add_file(path, path.parent)
        if len(self.sources) == count:
            names = ", ".join(sorted(self._others)[:3])
            content = f"{len(self._others)} other files, such as {names}" if names else "nothing"
            content += "".join(f"; {name}: {problem}" for name, problem in self.problems[:1])
            raise FrameError(f"no videos in {text}: found {content}. Expected {_EXPECTED}")

    def _add_file(self, path: Path, base: Path, *, listed: bool = False) -> None:
        if path.suffix.lower() == _SHARD:
            self._add_shard(path, base)
        elif listed or is_video(path):
            self.sources.append((base, path))
        elif not path.name.startswith("."):
            self._others.append(path.name)

    def _add_folder(self, root: Path) -> None:
        """Add the videos below a folder by path; a folder of images without videos is a video."""
        count, image_folders = len(self.sources), list[Path]()
        visited: set[str] = set()  # a link may lead to one of its parents

        def unreadable(error: OSError) -> None:
            problem = f"the folder cannot be read ({error.strerror or error})"
            self.problems.append((str(error.filename), problem))

        for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable):
            real = os.path.realpath(folder)
            below[:] = sorted(n for n in below if real not in visited and not n.startswith("."))
            if real in visited:
                continue
            visited.add(real)
            if any(map(is_image, names)):
                image_folders.append(Path(folder))
            for name in names:
                if not is_image(name):
                    self._add_file(Path(folder, name), root)
        paths = [*image_folders, *(Path(str(source)) for _, source in self.sources[count:])]
        parents = {parent for path in paths for parent in path.parents}
        self.sources += [(root, folder) for folder in image_folders if folder not in parents]
        self.sources[count:] = sorted(self.sources[count:], key=lambda item: str(item[1]))

    def _add_shard(self, path: Path, base: Path) -> None:
        """Add the videos of a shard, or the reason why it is unreadable."""
        count, others = len(self.sources), list[str]()
        try:
            length = path.stat().st_size
            # "r:" refuses compressed archives, whose members have no byte offset.
            with tarfile.open(path, "r:") as archive:
                for member in filter(tarfile.TarInfo.isreg, archive):
                    if member.offset_data + member.size > length:
                        raise tarfile.ReadError(f"cut off within {member.name}")
                    if is_video(member.name):
                        video = FileRange(path, member.offset_data, member.size, member.name)
                        self.sources.append((base, video))
                    else:
                        others.append(member.name)
            if len(self.sources) == count:
                content = ", ".join(others[:3]) or "nothing"
                self.problems.append((str(path), f"it holds no video files, but {content}"))
        except (tarfile.TarError, OSError) as error:
            problem = f"it is damaged or not an uncompressed tar archive ({error})"
            self.problems.append((str(path), problem))


def _paths_of(text: str) -> list[Path]:
    """Expand braces and wildcards."""
    path = Path(text).expanduser()
    if path.exists():
        return [path.absolute()]
    if "://" in text:
        raise FrameError(f"{text} is a URL; expected local files, so download it first")
    patterns = [text]
    if "{" in text:
        braces = require("braceexpand", extra="train", purpose="a pattern with braces")
        with contextlib.suppress(braces.UnbalancedBracesError):
            patterns = list(braces.braceexpand(text, escape=False))
    expanded = map(os.path.expanduser, patterns)
    names = [name for p in expanded for name in sorted(glob.glob(p, recursive=True))]  # noqa: PTH207
    if names:
        return [Path(name).absolute() for name in names]
    if patterns != [text] or glob.has_magic(text):
        raise FrameError(f"pattern {text} matches nothing; expected {_EXPECTED}")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, [name for name in siblings if not name.startswith(".")])
    raise FrameError(f"{path} does not exist.{hint} Expected {_EXPECTED}")


def read_list(path: Path) -> list[Path]:
    """Read a list of videos; returns absolute paths in the order of the file.

    A line holds a path, optionally followed by further columns: separated by a comma or a tab, or
    numbers after spaces. Paths are relative to the file's folder or to the working folder. Empty
    lines, lines that begin with ``#``, and a header line are ignored.

    Raises:
        FrameError: the file cannot be read, or none of its first 1000 paths exists.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FrameError(f"{path} cannot be read as a list of videos: {error}") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    names = [_COLUMNS.split(line)[0].strip("\"' ") for line in lines]
    names = names[bool(names) and names[0].lower() in _COLUMN_NAMES :]
    existing: dict[int, list[Path]] = {}  # paths by how many of them exist
    for base in (Path.cwd(), path.parent.absolute()):
        paths = [Path(os.path.normpath(base / Path(name).expanduser())) for name in names]
        existing[sum(listed.exists() for listed in paths[:_PATHS_CHECKED])] = paths
    if max(existing):
        return existing[max(existing)]
    checked = len(names[:_PATHS_CHECKED])
    raise FrameError(
        f"{path} lists {len(names)} videos, but none of the first {checked} exists; expected one "
        "path per line, relative to the list's folder or the working folder, optionally followed "
        f"by a comma and other columns, or by numbers, got {lines[-1:]}"
    )
