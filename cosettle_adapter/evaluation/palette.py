"""Label maps as palette PNGs, which the official DAVIS evaluation reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_adapter.imports import require
from cosettle_adapter.io import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def colours() -> bytes:
    """Return the palette of PASCAL VOC and DAVIS: 256 RGB colours.

    The bits of a label, three at a time, set the bits of red, green and blue from the highest down.
    """
    return bytes(
        sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(3))
        for label in range(256)
        for channel in range(3)
    )


def save_labels(labels: NDArray[np.uint8], path: Path) -> None:
    """Write a label map ``(H, W)`` as a palette PNG; whole or not at all."""
    image: Any = require("PIL.Image", extra="eval", purpose="writing predictions")
    picture = image.fromarray(labels, mode="P")
    picture.putpalette(colours())
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
