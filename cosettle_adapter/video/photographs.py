"""The photographs that scikit-image's wheel carries and that anybody may use for anything."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cosettle_adapter import extras
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.arrays import image_to_frame

# dedicated to the public domain, as scikit-image documents beside each of them:
_FILES = {
    "astronaut": "astronaut.png",  # Eileen Collins; NASA, public domain
    "chelsea": "chelsea.png",  # a cat; Stefan van der Walt, CC0
    "coffee": "coffee.png",  # a cup on wood; Rachel Michetti, CC0
    "hubble_deep_field": "hubble_deep_field.jpg",  # NASA and ESA, public domain
    "retina": "retina.jpg",  # Mikael Haggstrom, CC0
    "rocket": "rocket.jpg",  # a launch at dusk; SpaceX, public domain
}


def photographs() -> dict[str, Tensor]:
    """Load the photographs; they are read from scikit-image's files, nothing is downloaded.

    Returns:
        name -> (3, H, W) uint8 tensor, from 300 x 451 to 1411 x 1411 pixels.

    Raises:
        MissingExtraError: scikit-image or Pillow is not installed.
        FrameError: the installed scikit-image has been stripped of its photographs.
    """
    purpose = "loading the demo photographs"
    folder = Path(extras.require("skimage.data", extra="demo", purpose=purpose).__path__[0])
    image_module = extras.require("PIL.Image", extra="demo", purpose=purpose)
    loaded = {}
    for name, file in _FILES.items():
        try:
            with image_module.open(folder / file) as image:
                loaded[name] = image_to_frame(image)
        except FileNotFoundError as error:
            raise FrameError(
                f"scikit-image in {folder} lacks {file}; "
                "reinstall it from its wheel: pip install --force-reinstall scikit-image"
            ) from error
    return loaded
