"""Which files are videos and images, which of them a path or pattern means, and reading images."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from cosettle_adapter import imports
from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.video.arrays import image_to_frame

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip


def is_video(path: str | os.PathLike[str]) -> bool:
    """Tell by its name whether a file is a video: a suffix in any case, and not hidden."""
    return _has_suffix(path, VIDEO_SUFFIXES)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Tell by its name whether a file is an image: a suffix in any case, and not hidden."""
    return _has_suffix(path, IMAGE_SUFFIXES)


def find_videos(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """Find the video files of a folder, and below it if ``recursive``, in natural order.

    Hidden files and folders are left out; :class:`OSError` if the folder cannot be read.
    """
    return natural_order(path for path in _files(Path(folder), recursive) if is_video(path))


def find_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """Find the image files of a folder, as :func:`find_videos` finds videos."""
    return natural_order(path for path in _files(Path(folder), recursive) if is_image(path))


def resolve(source: str | os.PathLike[str]) -> Path | list[Path]:
    """Find what a path or pattern means: one file, perhaps a video, or images in natural order.

    Raises:
        FrameError: there is no such file, or no image among the files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return find_images(path) or _no_images(path)
    if path.is_file():
        found = [path]
    elif glob.has_magic(str(source)):
        found = _matching_files(str(source))
    elif "://" in str(source):
        raise FrameError(f"{source} is a URL; download it and pass the path of the file")
    else:
        entries = path.parent.iterdir() if path.parent.is_dir() else ()
        siblings = [e.name for e in entries if is_video(e) or is_image(e) or e.is_dir()]
        raise FrameError(f"{path} does not exist.{did_you_mean(path.name, siblings)}")
    return found if found[0].suffix.lower() in IMAGE_SUFFIXES else found[0]


def read_image(path: Path) -> Tensor:
    """Read an image file as (3, H, W) uint8, upright as its EXIF orientation says.

    Raises:
        FrameError: the file is missing, damaged or not an image.
    """
    image_module = imports.require("PIL.Image", extra="video", purpose="reading image files")
    operations = imports.require("PIL.ImageOps", extra="video", purpose="reading image files")
    try:
        with image_module.open(path) as image:
            return image_to_frame(operations.exif_transpose(image))
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
        # PIL reports some broken files as SyntaxError
        raise FrameError(f"{path} cannot be read as an image: {error}") from error


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people do: ``frame2`` before ``frame10``."""
    # the pattern has one group, so texts and digits alternate and compare like with like
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], name


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sort paths by :func:`natural_key`."""
    return sorted(paths, key=lambda path: natural_key(path.as_posix()))


def _has_suffix(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> bool:
    # hidden files are left out: macOS keeps attributes in ._name.jpg
    name = os.path.basename(path)  # noqa: PTH119  # faster than Path, and folders may be large
    return name.lower().endswith(suffixes) and not name.startswith(".")


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yield files, also those in folders below that are not hidden."""
    os.scandir(folder).close()  # raises if it cannot be read

    def report(error: OSError) -> None:
        logger.warning("%s is left out: %s", error.filename, error.strerror)

    for root, below, names in os.walk(folder, onerror=report):
        below[:] = [name for name in below if recursive and not name.startswith(".")]
        yield from (Path(root, name) for name in names)


def _no_images(folder: Path) -> list[Path]:
    entries = natural_order(folder.iterdir())
    held = ", ".join(path.name for path in entries[:3]) or "nothing"
    raise FrameError(
        f"folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); it holds {held}"
        f"{', ...' if len(entries) > 3 else ''}; a video is opened by its own path"
    )


def _matching_files(pattern: str) -> list[Path]:
    names = glob.glob(os.path.expanduser(pattern), recursive=True)  # noqa: PTH111, PTH207
    matches = natural_order(path for path in map(Path, names) if path.is_file())
    images = [path for path in matches if is_image(path)]
    if images or len(matches) == 1:
        return images or matches
    if matches:
        raise FrameError(
            f"pattern {pattern} matches {len(matches)} files and none is an image, among them "
            f"{matches[0].name} and {matches[1].name}; open videos one at a time"
        )
    raise FrameError(f"pattern {pattern} matches no files; folders in it must exist")
