"""A corpus: the videos that training draws from, read a few frames at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter.errors import CosettleError, FrameError
from cosettle_adapter.training.discovery import EXPECTED, Discovery, Found, discover
from cosettle_adapter.video.decoder import FileRange, decode_video
from cosettle_adapter.video.files import IMAGE_SUFFIXES, natural_key, read_image
from cosettle_adapter.video.random_access import count_frames, read_frames
from cosettle_adapter.video.selection import PendingFrame


@dataclasses.dataclass(frozen=True, slots=True)
class Video:
    """A video of a corpus: a video file, a member of a shard, or a folder of images.

    Attributes:
        name: path below the corpus, with forward slashes; no two videos have the same.
        where: the file or folder.
    """

    name: str
    where: Found

    def length(self) -> int:
        """Count the frames.

        Raises:
            FrameError: it cannot be read, or is damaged or cut off as far as can be told without
                decoding.
        """
        with self._named():
            if self.where.frames is not None:
                return self.where.frames
            source = self._source()
            return len(source) if isinstance(source, list) else count_frames(source)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode given frames and as few others as possible.

        Args:
            indices: 0-based, in any order, repeated or not.

        Returns:
            (T, 3, H, W) uint8, in the order of ``indices``.

        Raises:
            FrameError: a frame that does not exist or cannot be read, or frames of several sizes.
        """
        with self._named():
            source = self._source()
            if not isinstance(source, list):
                return read_frames(source, indices)
            if self.where.frames not in (None, len(source)):
                raise FrameError(
                    f"{self.where.path} holds {len(source)} images, but the index of its corpus "
                    f"says {self.where.frames}; run prepare again, or delete the index"
                )
            frames = {index: read_image(source[index]) for index in set(indices)}
            if len({frame.shape for frame in frames.values()}) > 1:
                raise FrameError(f"the images in {self.where.path} are of several sizes")
            return torch.stack([frames[index] for index in indices])

    def frames(self) -> Generator[PendingFrame, None, None]:
        """Yield all frames in order, with their times in seconds (images: their positions).

        Raises:
            FrameError: it cannot be read.
            TruncatedVideoError: it breaks off; all that is readable was yielded before.
        """
        with self._named():
            source = self._source()
            if not isinstance(source, list):
                yield from decode_video(source)
                return
            for position, path in enumerate(source):
                yield PendingFrame(float(position), str(path), partial(read_image, path))

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of images."""
        return self.where.size is None and Path(self.where.path).is_dir()

    def content_size(self) -> int:
        """Return the bytes of a video file, the frames of an indexed folder, or -1."""
        if self.where.frames is not None or self.where.size is not None:
            return self.where.frames or self.where.size or 0
        try:
            status = Path(self.where.path).stat()
        except OSError:
            return -1
        # the size of a folder is the file system's own affair
        return -1 if stat.S_ISDIR(status.st_mode) else status.st_size

    def _source(self) -> FileRange | Path | list[Path]:
        where = self.where
        path = Path(where.path)
        if where.size is not None:
            return FileRange(path, where.start, where.size, where.member)
        if not path.is_dir():
            return path
        names = [
            name
            for name in os.listdir(path)  # noqa: PTH208  # by far the fastest way
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
        if not names:
            raise FrameError(f"{path} is a folder without images ({', '.join(IMAGE_SUFFIXES)})")
        return [path / name for name in sorted(names, key=natural_key)]

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn whatever a reader raises on a damaged file into a sentence."""
        try:
            yield
        except CosettleError:
            raise
        except Exception as error:
            raise FrameError(
                f"{self.name} cannot be read ({type(error).__name__}: {error})"
            ) from error


class Corpus:
    """Videos in a fixed order, from one or several places.

    Opening one is cheap: folders are listed and the headers of shards are read, and nothing is
    decoded. Frames are counted when a video is first drawn.

    Attributes:
        videos: in order; a video that was found twice is there once.
        problems: shards and folders that could not be read, and why.
    """

    def __init__(self, videos: Iterable[Video], problems: Iterable[tuple[str, str]] = ()) -> None:
        self.videos = tuple(videos)
        self.problems = tuple(problems)

    @classmethod
    def open(cls, data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Corpus:
        """Find videos.

        Args:
            data: one or several of: a folder, searched with all folders in it for video files,
                WebDataset shards and folders of images (each one video, in natural order); a
                ``.txt`` or ``.csv`` file that lists paths (see
                :func:`~cosettle_adapter.training.discovery.read_list`); a pattern, also with
                braces, ``shards-{000..009}.tar``; a single video or shard.

        Raises:
            FrameError: one of them does not exist, or holds no videos.
        """
        places = [data] if isinstance(data, (str, os.PathLike)) else list(data)
        if not places:
            raise FrameError(f"no data was given; expected {EXPECTED}")
        found = [discover(place) for place in places]
        problems = [problem for each in found for problem in each.problems]
        return cls(_named_videos(found), problems)

    def __len__(self) -> int:
        return len(self.videos)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over names and byte sizes in order; the content of the files is not read."""
        summed = hashlib.sha256()
        for video in self.videos:
            summed.update(f"{video.name}\0{video.content_size()}\n".encode())
        return summed.hexdigest()


def _named_videos(found: Sequence[Discovery]) -> Iterator[Video]:
    """Name videos by their paths below what all places have in common."""
    bases = sorted({video.base for each in found for video in each.videos})
    common = os.path.commonpath(bases) if bases else ""
    real = {base: os.path.realpath(base) for base in bases}
    seen: set[tuple[str, int]] = set()
    for video in (video for each in found for video in each.videos):
        below = os.path.relpath(video.path, video.base)
        place = video.real or os.path.normpath(f"{real[video.base]}/{below}")
        if (place, video.start) in seen:
            continue
        seen.add((place, video.start))
        name = os.path.relpath(video.path, common)
        if name.startswith(os.pardir):  # a list may name paths anywhere
            name = video.path.lstrip(os.sep)
        if video.path == common:
            name = os.path.basename(video.path)  # noqa: PTH119
        if video.member:
            name = f"{os.path.splitext(name)[0]}/{video.member}"  # noqa: PTH122
        yield Video(name.replace(os.sep, "/"), video)
