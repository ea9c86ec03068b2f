"""Find videos and images by path or pattern, and read images."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.video.arrays import image_to_frame
from cosettle_adapter.video.selection import LostFrames, PendingFrame
from cosettle_adapter.video.sources import Input, as_input

logger = logging.getLogger(__name__)

_NAMED = 8  # files that a log line lists
_KINDS = {".jpeg": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}  # suffixes of one kind of image

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
VIDEO_SUFFIXES = (
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264",
    ".h265", ".hevc", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv",
    ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb",
    ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip


class DamagedImageError(FrameError):
    """An image file that cannot be read to its end."""


def is_video(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a video by its name: a suffix in any case, not hidden."""
    return _has_suffix(path, VIDEO_SUFFIXES)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image by its name: a suffix in any case, not hidden."""
    return _has_suffix(path, IMAGE_SUFFIXES)


def find_videos(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """Return the videos of a folder, if ``recursive`` of its subfolders too, in natural order."""
    return find_media(folder, recursive=recursive)[1]


def find_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """Return the images of a folder, if ``recursive`` of its subfolders too, in natural order."""
    return find_media(folder, recursive=recursive)[0]


def find_media(
    folder: str | os.PathLike[str], *, recursive: bool = False
) -> tuple[list[Path], list[Path]]:
    """Find the images and the videos of a folder; other files are named in a log line."""
    paths = natural_order(_files(Path(folder), recursive))
    images, videos = [*filter(is_image, paths)], [*filter(is_video, paths)]
    if others := [path.name for path in paths if not is_image(path) and not is_video(path)]:
        named = ", ".join(others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
        logger.info("%s: left out %d files of other suffixes: %s", folder, len(others), named)
    return images, videos


def resolve(source: str | os.PathLike[str]) -> Path | Input | list[Path]:
    """Resolve a path, URL or pattern to a file, an input, or images in natural order."""
    if (stream := as_input(source)) is not None:
        return stream
    path, pattern = Path(source).expanduser(), os.path.expanduser(source)  # noqa: PTH111
    if path.is_dir():
        if images := find_images(path):
            return _one_kind(path, images)
        contents = ", ".join(entry.name for entry in natural_order(path.iterdir())[:3]) or "nothing"
        raise FrameError(
            f"folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}); it holds {contents}; "
            "to open a video, pass its own path"
        )
    if path.is_file():
        return [path] if path.suffix.lower() in IMAGE_SUFFIXES else path
    if not glob.has_magic(pattern):
        entries = path.parent.iterdir() if path.parent.is_dir() else ()
        siblings = [e.name for e in entries if is_video(e) or is_image(e) or e.is_dir()]
        raise FrameError(f"{path} does not exist.{did_you_mean(path.name, siblings)}")
    matches = natural_order(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    if images := [file for file in files if is_image(file)]:
        return images
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files[:3]) or "nothing"
    raise FrameError(f"pattern {source} matches {names}; expected images, or a single video")


def read_image(path: Path, *, warn: bool = True) -> Tensor:
    """Read an image file as (3, H, W) uint8, upright according to its EXIF orientation.

    Of a file of several images, the first one is read; a warning says so unless ``warn`` is false.

    Raises:
        DamagedImageError: the file is damaged or cut off.
        FrameError: it is no image, or its values are in no known range.
    """
    with _opened(path) as image:
        pages = getattr(image, "n_frames", 1)
        if warn and pages > 1 and image.format != "MPO":  # a photograph with its preview
            logger.warning("%s holds %d images; only the first one is read", path, pages)
        return _pixels(image, path)


def count_pages(path: Path) -> int:
    """Count the images in an image file."""
    with _opened(path) as image:
        return getattr(image, "n_frames", 1)


def read_pages(path: Path) -> Generator[PendingFrame | LostFrames, None, None]:
    """Yield the images in a file, with the times it stores, else their positions."""
    time, lasts, page, count = 0.0, 1.0, 0, 1
    try:
        with _opened(path) as image:
            count = image.n_frames
            for page in range(count):
                image.seek(page)
                load = functools.cache(functools.partial(_page, image, path, page))
                yield PendingFrame(round(time, 6), f"frame {page} of {path}", load)
                # only TIFF can be read backwards, and the file is closed after the last page
                if image.format != "TIFF" or page == count - 1:
                    with contextlib.suppress(FrameError):
                        load()
                stored = image.info.get("duration")  # milliseconds; of WebP, known after loading
                lasts = 1.0 if stored is None else stored / 1000
                time += lasts
    except DamagedImageError as error:
        yield LostFrames(tuple(time + lasts * n for n in range(count - page)), str(error))


def _page(image: Any, path: Path, page: int) -> Tensor:
    with _damage_as_error(path):
        if image.tell() != page:
            image.seek(page)
        return _pixels(image, path)


def _pixels(image: Any, path: Path) -> Tensor:
    operations = imports.require("PIL.ImageOps", extra="video", purpose="reading image files")
    try:
        return image_to_frame(operations.exif_transpose(image))
    except FrameError as error:
        raise FrameError(f"{path}: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    pil = imports.require("PIL.Image", extra="video", purpose="reading image files")
    if path.suffix.lower() in (".heic", ".heif"):
        imports.require(
            "pillow_heif", extra="heif", purpose="reading HEIC images"
        ).register_heif_opener()
    with _damage_as_error(path), pil.open(path) as image:
        yield image


@contextlib.contextmanager
def _damage_as_error(path: Path) -> Iterator[None]:
    """Convert the errors that PIL raises for a broken file to :class:`DamagedImageError`."""
    pil = imports.require("PIL.Image", extra="video", purpose="reading image files")
    try:
        yield
    # PIL reports some broken files as SyntaxError or TypeError
    except (
        OSError, SyntaxError, TypeError, EOFError, ValueError, pil.DecompressionBombError
    ) as error:  # fmt: skip
        if isinstance(error, FrameError):
            raise
        raise DamagedImageError(f"{path} cannot be read as an image: {error}") from error


def _one_kind(folder: Path, images: list[Path]) -> list[Path]:
    """Keep one kind of images where several kinds share names, such as frames and their masks."""
    stems = Counter(path.stem for path in images)
    if max(stems.values()) == 1:
        return images
    kinds = [_KINDS.get(suffix := path.suffix.lower(), suffix) for path in images]
    counts = Counter(kinds)
    best = max(counts, key=lambda kind: (counts[kind], kind == ".jpg"))
    kept = [path for path, kind in zip(images, kinds, strict=True) if kind == best]
    message = "%s: reading its %d images of kind %s; left out %d of other kinds with the same names"
    logger.warning(message, folder, len(kept), best, len(images) - len(kept))
    return kept


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people do: ``frame2`` before ``frame10``."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], name


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sort paths by :func:`natural_key`."""
    return sorted(paths, key=lambda path: natural_key(path.as_posix()))


def _has_suffix(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> bool:
    name = Path(path).name  # not hidden: macOS stores attributes in ._name.jpg
    return name.lower().endswith(suffixes) and not name.startswith(".")


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yield files, and those in folders below that are not hidden; links are followed, once."""
    os.scandir(folder).close()  # raises if it cannot be read
    visited: set[str] = set()

    def report(error: OSError) -> None:
        logger.warning("%s is left out: %s", error.filename, error.strerror)

    for root, below, names in os.walk(folder, followlinks=True, onerror=report):
        real = os.path.realpath(root)
        below[:] = [name for name in below if recursive and not name.startswith(".")]
        if real in visited:
            below.clear()
            continue
        visited.add(real)
        yield from (Path(root, name) for name in names if not name.startswith("."))
