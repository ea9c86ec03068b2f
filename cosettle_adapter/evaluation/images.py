"""Frames and label maps from image files, as NumPy arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange

from cosettle_adapter.errors import FrameError
from cosettle_adapter.imports import require
from cosettle_adapter.video.files import read_image

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_frame(path: Path) -> NDArray[np.uint8]:
    """Read an image, upright: ``(H, W, 3)`` uint8; a FrameError if it cannot be read."""
    frame: NDArray[np.uint8] = rearrange(read_image(path), "c h w -> h w c").contiguous().numpy()
    return frame


def read_labels(path: Path, *, colours: bool = False) -> NDArray[np.uint8]:
    """Read a label map: ``(H, W)`` uint8, the palette index or grey value of every pixel.

    With ``colours`` an RGB image is read as well, as 1 where any colour is above 0.

    Raises:
        FrameError: the file is missing or damaged, or its pixels are not labels.
    """
    with _opened(path, "a mask") as image:
        if image.mode in ("P", "L", "1"):
            labels: NDArray[np.uint8] = np.asarray(image).astype(np.uint8)
            return labels
        if not colours:
            raise FrameError(
                f"{path} is a {image.mode} image, expected a palette (P) or grey (L) PNG whose "
                "values are object ids; take the data set's own annotations, or save your masks "
                "as one number a pixel"
            )
        bright: NDArray[np.uint8] = np.asarray(image.convert("RGB")).max(2) > 0
        return bright.astype(np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from an image's header; a FrameError if it cannot be read."""
    with _opened(path, "an image") as image:
        width, height = image.size
        return height, width


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    pillow: Any = require("PIL.Image", extra="eval", purpose="reading images")
    try:
        with pillow.open(path) as image:
            yield image
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise FrameError(f"{path} cannot be read as {what}: {error}") from error
