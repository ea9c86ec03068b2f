"""Frames as DINO-Tracker's ``load_video`` reads them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.dino_tracker.cells import FRAME
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.arrays import image_to_frame


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder as ``load_video`` does: ``.jpg`` and ``.png``, sorted as paths.

    So ``10.png`` comes before ``9.png``, ``.jpeg`` and ``.JPG`` are not seen, and hidden files are.
    """
    return sorted([*folder.glob("*.jpg"), *folder.glob("*.png")])


def read_frame(path: Path) -> Tensor:
    """Read one frame at the size of the tracker, by Lanczos, not turned by its EXIF orientation.

    Returns:
        ``(3, 476, 854)`` uint8.

    Raises:
        FrameError: not an image, or one that is not RGB, which DINO-Tracker cannot take either.
    """
    image_module = extras.require("PIL.Image", extra="video", purpose="reading image files")
    try:
        with image_module.open(path) as image:
            if image.mode != "RGB":
                raise FrameError(
                    f"{path} is an image of mode {image.mode}, and DINO-Tracker takes RGB alone; "
                    "convert the frames first, for example with PIL's image.convert('RGB')"
                )
            height, width = FRAME
            return image_to_frame(image.resize((width, height), image_module.Resampling.LANCZOS))
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
        # PIL reports some broken files as SyntaxError
        raise FrameError(f"{path} cannot be read as an image: {error}") from error
