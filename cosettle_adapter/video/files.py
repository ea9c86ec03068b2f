"""Find videos and images by path or pattern, and read images."""

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
    """Return whether a file is a video by its name: a suffix in any case, not hidden."""
    return _has_suffix(path, VIDEO_SUFFIXES)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image by its name: a suffix in any case, not hidden."""
    return _has_suffix(path, IMAGE_SUFFIXES)


def find_videos(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """Return the videos of a folder, if ``recursive`` of its subfolders too, in natural order."""
    return natural_order(path for path in _files(Path(folder), recursive) if is_video(path))


def find_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """Return the images of a folder, if ``recursive`` of its subfolders too, in natural order."""
    return natural_order(path for path in _files(Path(folder), recursive) if is_image(path))


def resolve(source: str | os.PathLike[str]) -> Path | list[Path]:
    """Resolve a path or pattern to one file, perhaps a video, or to images in natural order."""
    path, pattern = Path(source).expanduser(), os.path.expanduser(source)  # noqa: PTH111
    if path.is_dir():
        if images := find_images(path):
            return images
        contents = ", ".join(entry.name for entry in natural_order(path.iterdir())[:3]) or "nothing"
        raise FrameError(
            f"folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}); it holds {contents}; "
            "to open a video, pass its own path"
        )
    if path.is_file():
        return [path] if path.suffix.lower() in IMAGE_SUFFIXES else path
    if "://" in str(source):
        raise FrameError(f"{source} is a URL; download it and pass the path of the file")
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


def read_image(path: Path) -> Tensor:
    """Read an image file as (3, H, W) uint8, rotated upright by its EXIF orientation."""
    operations = imports.require("PIL.ImageOps", extra="video", purpose="reading image files")
    pil = operations.Image
    try:
        with pil.open(path) as image:
            return image_to_frame(operations.exif_transpose(image))
    except (OSError, SyntaxError, pil.DecompressionBombError) as error:
        # PIL reports some broken files as SyntaxError
        raise FrameError(f"{path} cannot be read as an image: {error}") from error


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
    """Yield the files of a folder, if ``recursive`` also those of subfolders not hidden."""
    os.scandir(folder).close()  # raises if the folder cannot be read; os.walk would not

    def report(error: OSError) -> None:
        logger.warning("skipping %s: %s", error.filename, error.strerror)

    for root, subfolders, names in os.walk(folder, onerror=report):
        subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
        yield from (Path(root, name) for name in names)
