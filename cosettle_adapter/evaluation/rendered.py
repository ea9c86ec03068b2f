"""Photographs in known motion: do patches match what they show, and how far do they drift?"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from einops import rearrange

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import Clip, data_folder, found_in, images_in, pick
from cosettle_adapter.evaluation.drift import GAPS, match_accuracy, true_correspondences
from cosettle_adapter.evaluation.protocols import ClipScores, Protocol
from cosettle_adapter.video import files, photographs, render_clip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from cosettle_adapter.evaluation.drift import Correspondence
    from cosettle_adapter.video import RenderedClip
    from cosettle_adapter.video.geometry import Geometry
    from cosettle_adapter.video.synthetic import Motion

FRAMES = 16
SIZE = (280, 490)
MOTIONS: tuple[Motion, ...] = ("zoom", "mixed")  # a pan takes all patches equally far
AMOUNT = 0.5
CAMERA_NOISE = 0.5


class _Frames(Sequence["NDArray[np.uint8]"]):
    """The frames of a clip that is rendered when the first of them is read."""

    def __init__(self, render: tuple[str | Path, str | Path, Motion, int]) -> None:
        self._render = render

    def clip(self) -> RenderedClip:
        return _rendered(*self._render)

    def __len__(self) -> int:
        return FRAMES

    def __getitem__(self, index: int) -> NDArray[np.uint8]:  # type: ignore[override]
        return rearrange(self.clip().frames[index], "c h w -> h w c").numpy()


def rendered_clips(
    root: str | Path | None = None, *, clips: Sequence[str] | None = None
) -> list[Clip[RenderedClip]]:
    """List clips of every photograph under every motion, the next photograph moving over it.

    Args:
        root: a folder of image files; by default the photographs that scikit-image carries.
        clips: names of the clips wanted, ``<photograph>-<motion>``; by default all.

    Returns:
        The clips. Annotations are the whole rendered clip, which knows its motion.

    Raises:
        FrameError: a folder without images, two images of one name, or a clip that is not there.
        MissingExtraError: scikit-image is not installed and ``root`` not given.
    """
    photos: Sequence[str | Path] = (
        list(photographs())
        if root is None
        else images_in(data_folder(root, "a folder of photographs"))
    )
    if root is not None and not photos:
        raise FrameError(f"{root} holds no image files, found {found_in(Path(root))}")
    found: dict[str, Clip[RenderedClip]] = {}
    for number, photo in enumerate(photos):
        cutout = photos[(number + 1) % len(photos)]
        for motion in MOTIONS:
            name = f"{Path(photo).stem}-{motion}"
            if name in found:
                raise FrameError(f"{root} has several photographs for {name!r}; rename one")
            frames = _Frames((photo, cutout, motion, number))
            found[name] = Clip(name, frames, frames.clip, inputs=(photo, cutout))
    wanted = set(pick(clips, found, "rendered clip {}"))
    return [clip for name, clip in found.items() if name in wanted]


def rendered_protocol(
    data: Path | None = None, *, clips: Sequence[str] | None = None
) -> Protocol[RenderedClip]:
    """Return the benchmark: the share of patches whose nearest neighbour is within one patch of
    the truth, by gap in frames.
    """

    def correspondences(
        clip: Clip[RenderedClip], geometry: Geometry
    ) -> Mapping[int, Sequence[Correspondence]]:
        whole = clip.read_annotations()
        return {gap: true_correspondences(whole, geometry, gap) for gap in GAPS}

    def score(
        clip: Clip[RenderedClip], features: Tensor, geometry: Geometry, _: Path | None
    ) -> ClipScores:
        pairs = correspondences(clip, geometry)
        return ClipScores({f"match@{gap}": match_accuracy(features, pairs[gap]) for gap in gaps})

    gaps = (4, 1, 8)  # compared by the middle one
    return Protocol(
        name="rendered",
        measures=tuple(f"match@{gap}" for gap in gaps),
        clips=lambda: rendered_clips(data, clips=clips),
        size=lambda _: SIZE,
        score=score,
        settings={
            "frames": FRAMES,
            "rendered_size": list(SIZE),
            "amount": AMOUNT,
            "photometric": CAMERA_NOISE,
        },
        correspondences=correspondences,
    )


@functools.lru_cache(maxsize=1)
def _rendered(photo: str | Path, cutout: str | Path, motion: Motion, seed: int) -> RenderedClip:
    return render_clip(
        _read(photo),
        cutout=_read(cutout),
        frames=FRAMES,
        size=SIZE,
        motion=motion,
        amount=AMOUNT,
        seed=seed,
        photometric=CAMERA_NOISE,
    )


def _read(photo: str | Path) -> Tensor:
    return files.read_image(photo) if isinstance(photo, Path) else photographs()[photo]
