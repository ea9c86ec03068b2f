"""Clips rendered from photographs, whose motion is known, and their benchmark of matching."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import Clip, data_folder, found_in, images_in, pick
from cosettle_adapter.evaluation.drift import (
    GAPS,
    Correspondence,
    match_accuracy,
    true_correspondences,
)
from cosettle_adapter.evaluation.run import ClipScores, Protocol
from cosettle_adapter.video import RenderedClip, files, photographs, render_clip
from cosettle_adapter.video.geometry import Geometry
from cosettle_adapter.video.synthetic import Motion

FRAMES = 16
SIZE = (280, 490)
MOTIONS: tuple[Motion, ...] = ("zoom", "mixed")  # not "pan", which moves all patches equally
AMOUNT = 0.5
CAMERA_NOISE = 0.5


def rendered_clips(
    root: str | Path | None = None, *, clips: Sequence[str] | None = None
) -> list[Clip[RenderedClip]]:
    """List clips ``<photograph>-<motion>``: the next photograph moves over a moving photograph.

    Photographs are the images in ``root``, by default those of scikit-image. The annotation is
    the whole rendered clip, which knows its motion.

    Raises:
        FrameError: the folder has no images or two of one name, or a clip does not exist.
        MissingExtraError: scikit-image is not installed and ``root`` is not given.
    """
    folder = None if root is None else data_folder(root, "a folder of photographs")
    photos: list[Any] = list(photographs()) if folder is None else images_in(folder)
    if folder is not None and not photos:
        raise FrameError(f"{folder} holds no image files; found {found_in(folder)}")
    known: dict[str, Clip[RenderedClip]] = {}
    for number, photo in enumerate(photos):
        cutout = photos[(number + 1) % len(photos)]
        for motion in MOTIONS:
            name = f"{Path(photo).stem}-{motion}"
            if name in known:
                raise FrameError(f"{root} has several photographs for {name!r}; rename one")
            recipe = (photo, cutout, motion, number)
            frames = [functools.partial(_frame, recipe, index) for index in range(FRAMES)]
            read = functools.partial(_rendered, *recipe)
            known[name] = Clip(name, frames, read, inputs=(photo, cutout))
    return [known[name] for name in pick(clips, known, "rendered clip {}")]


def rendered_protocol(
    data: Path | None = None, *, clips: Sequence[str] | None = None
) -> Protocol[RenderedClip]:
    """Return the benchmark: shares of patches that match within one patch of the truth, by gap."""

    @functools.lru_cache(maxsize=1)  # shared by all variants of a clip
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

    gaps = (4, 1, 8)  # the first measure, by which variants are compared, is the middle gap
    settings = {"frames": FRAMES, "rendered_size": list(SIZE), "amount": AMOUNT}
    return Protocol(
        name="rendered",
        measures=tuple(f"match@{gap}" for gap in gaps),
        clips=lambda: rendered_clips(data, clips=clips),
        size=lambda _: SIZE,
        score=score,
        settings=settings | {"photometric": CAMERA_NOISE},
        correspondences=correspondences,
    )


@functools.lru_cache(maxsize=1)
def _rendered(photo: str | Path, cutout: str | Path, motion: Motion, seed: int) -> RenderedClip:
    first, second = (
        files.read_image(source) if isinstance(source, Path) else photographs()[source]
        for source in (photo, cutout)
    )
    return render_clip(
        first, cutout=second, motion=motion, amount=AMOUNT, photometric=CAMERA_NOISE,
        frames=FRAMES, size=SIZE, seed=seed,
    )  # fmt: skip


def _frame(recipe: tuple[str | Path, str | Path, Motion, int], index: int) -> NDArray[np.uint8]:
    return rearrange(_rendered(*recipe).frames[index], "c h w -> h w c").numpy()
