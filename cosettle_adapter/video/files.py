"""Which files a path or a pattern means, and reading the images among them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError, did_you_mean
from cosettle_adapter.video.arrays import image_to_frame

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip

_MAGIC = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"([0-9]+)")


def resolve(source: str | os.PathLike[str]) -> Path | list[Path]:
    """Find what a path or pattern means.

    Returns:
        The path of a file that is not an image, so perhaps a video; or image files in natural
        order, ``frame2`` before ``frame10``.

    Raises:
        FrameError: there is no such file, or no image among the files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _images_in_folder(path)
    if path.is_file():
        found = [path]
    elif _MAGIC.search(str(source)):
        found = _matching_files(str(source))
    elif "://" in str(source):
        raise FrameError(f"{source} is a URL; download it and pass the path of the file")
    else:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        siblings = [name for name in names if not name.startswith(".")]
        raise FrameError(f"{path} does not exist.{did_you_mean(path.name, siblings)}")
    return found if found[0].suffix.lower() in IMAGE_SUFFIXES else found[0]


def read_image(path: Path) -> Tensor:
    """Read an image file, upright as its EXIF orientation says; transparency is dropped.

    Returns:
        (3, H, W) uint8 tensor.

    Raises:
        FrameError: the file is missing, damaged or not an image.
    """
    purpose = "reading image files"
    image_module = extras.require("PIL.Image", extra="video", purpose=purpose)
    operations = extras.require("PIL.ImageOps", extra="video", purpose=purpose)
    try:
        with image_module.open(path) as image:
            return image_to_frame(operations.exif_transpose(image))
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
        # PIL reports some broken files as SyntaxError
        raise FrameError(f"{path} cannot be read as an image: {error}") from error


def _images_in_folder(folder: Path) -> list[Path]:
    entries = _natural_order(folder.iterdir())
    images = [path for path in entries if _is_image_file(path)]
    if not images:
        held = ", ".join(path.name for path in entries[:3]) or "nothing"
        raise FrameError(
            f"folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); it holds {held}"
            f"{', ...' if len(entries) > 3 else ''}; a video is opened by its own path"
        )
    return images


def _matching_files(pattern: str) -> list[Path]:
    parts = Path(pattern).expanduser().parts
    fixed = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    matches = _natural_order(
        path for path in Path(*parts[:fixed]).glob("/".join(parts[fixed:])) if path.is_file()
    )
    images = [path for path in matches if _is_image_file(path)]
    if images or len(matches) == 1:
        return images or matches
    if matches:
        raise FrameError(
            f"pattern {pattern} matches {len(matches)} files and none is an image, among them "
            f"{matches[0].name} and {matches[1].name}; open videos one at a time"
        )
    raise FrameError(f"pattern {pattern} matches no files; folders in it must exist")


def _is_image_file(path: Path) -> bool:
    # hidden files are not pictures: macOS keeps attributes in ._name.jpg
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _natural_order(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: natural_key(path.as_posix()))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people do: ``frame2`` before ``frame10``."""
    # the pattern has one group, so texts and digits alternate and compare like with like
    pieces = _NUMBER.split(name.casefold())
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], name
