"""Clips of exactly known motion, rendered from photographs: nothing needs to be annotated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from einops import rearrange

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets.layout import existing_folder, found_in, images_in, pick
from cosettle_adapter.video import files, photographs, render_clip
from cosettle_adapter.video.rendered import Motion, RenderedClip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FRAMES = 16
SIZE = (280, 490)
MOTIONS: tuple[Motion, ...] = ("zoom", "mixed")  # a pan takes all patches equally far
AMOUNT = 0.5
PHOTOMETRIC = 0.5


@dataclasses.dataclass(frozen=True)
class RenderedPhoto:
    """A clip that is rendered when it is read.

    Attributes:
        photo: name of one of :func:`~cosettle_adapter.video.photographs`, or an image file.
        cutout: likewise, what moves over it.
        motion: the camera's.
        seed: decides directions and paths.
    """

    photo: str | Path
    cutout: str | Path
    motion: Motion
    seed: int
    problem: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        """Name of the photograph and the motion."""
        return f"{Path(self.photo).stem}-{self.motion}"

    @property
    def frames(self) -> tuple[Path, ...]:
        """The files that it is made from."""
        return tuple(path for path in (self.photo, self.cutout) if isinstance(path, Path))

    def __len__(self) -> int:
        return FRAMES

    def rendered(self) -> RenderedClip:
        """Render it; the clip that was rendered last is kept.

        Raises:
            FrameError: an image file that cannot be read.
        """
        return _rendered(self)

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Return one frame: ``(H, W, 3)`` uint8, RGB."""
        frame: NDArray[np.uint8] = rearrange(
            self.rendered().frames[index], "c h w -> h w c"
        ).numpy()
        return frame


@functools.lru_cache(maxsize=1)
def _rendered(clip: RenderedPhoto) -> RenderedClip:
    return render_clip(
        _read(clip.photo),
        cutout=_read(clip.cutout),
        frames=FRAMES,
        size=SIZE,
        motion=clip.motion,
        amount=AMOUNT,
        seed=clip.seed,
        photometric=PHOTOMETRIC,
    )


def _read(photo: str | Path) -> Tensor:
    return files.read_image(photo) if isinstance(photo, Path) else photographs()[photo]


def rendered_photos(
    root: str | Path | None = None, *, clips: Sequence[str] | None = None
) -> list[RenderedPhoto]:
    """List clips of every photograph under every motion, the next photograph moving over it.

    Args:
        root: a folder of image files; by default the photographs that scikit-image carries.
        clips: names of the clips wanted, ``<photograph>-<motion>``; by default all.

    Raises:
        FrameError: a folder without images, two images of one name, or a clip that is not there.
        MissingExtraError: scikit-image is not installed and ``root`` not given.
    """
    photos: Sequence[str | Path] = (
        list(photographs())
        if root is None
        else images_in(existing_folder(root, "a folder of photographs"))
    )
    if root is not None and not photos:
        raise FrameError(f"{root} holds no image files, found {found_in(Path(root))}")
    found = [
        RenderedPhoto(photo, photos[(number + 1) % len(photos)], motion, seed=number)
        for number, photo in enumerate(photos)
        for motion in MOTIONS
    ]
    names = [clip.name for clip in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FrameError(f"{root} has several photographs for {twice[0]!r}; rename one")
    for name in clips or ():
        pick(name, names, f"rendered clip {name!r}")
    return [clip for clip in found if clips is None or clip.name in clips]
