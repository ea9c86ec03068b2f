"""Names of version 0.1, which warn; they go in version 0.3."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import Clip
from cosettle_adapter.evaluation.davis import davis_clips
from cosettle_adapter.evaluation.masks import Summary, boundary_f, region_similarity, summarise
from cosettle_adapter.evaluation.points import THRESHOLDS, TapVidMetrics
from cosettle_adapter.evaluation.protocols import mean
from cosettle_adapter.video import FrameSelection

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_EVALUATION = "cosettle_adapter.evaluation"
_CLIPS = ("Badja", "Davis", "Folder", "Jhmdb", "Mask", "TapVid", "Vip", "Joint")

# old name to module, new name, and what to use
MOVED = {
    **{f"{name}Clip": ("clips", "Clip", "Clip") for name in _CLIPS},
    "DavisSequence": ("clips", "Clip", "Clip"),
    "davis_sequences": ("legacy", "davis_sequences", "davis_clips"),
    "MaskScores": ("legacy", "MaskScores", "evaluate_sequence"),
    "j_and_f": ("legacy", "j_and_f", "region_similarity and boundary_f, or evaluate_sequence"),
    "mean_over_videos": ("legacy", "mean_over_videos", "the mean of each figure"),
}


def moved(name: str) -> Any:
    """Return what a name of version 0.1 means now, with a warning.

    Raises:
        AttributeError: there was no such name.
    """
    if name not in MOVED:
        raise AttributeError(f"module {_EVALUATION!r} has no attribute {name!r}")
    module, attribute, instead = MOVED[name]
    warnings.warn(
        f"{_EVALUATION}.{name} goes in version 0.3; use {instead}", DeprecationWarning, stacklevel=3
    )
    return getattr(importlib.import_module(f"{_EVALUATION}.{module}"), attribute)


def davis_sequences(
    root: str | Path,
    *,
    year: Literal["2016", "2017"] | None = None,
    subset: str | None = None,
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
    every: int = 1,
    max_frames: int | None = None,
) -> list[Clip[NDArray[np.uint8]]]:
    """Use :func:`~cosettle_adapter.evaluation.davis_clips`."""
    return davis_clips(
        root,
        year=year,
        subset=subset,
        resolution=resolution,
        clips=sequences,
        select=FrameSelection(every=every, max_frames=max_frames),
    )


class MaskScores(NamedTuple):
    """J and F of one object over a clip, one value a frame that counts."""

    j: tuple[float, ...]
    f: tuple[float, ...]

    @property
    def j_summary(self) -> Summary:
        """Mean, recall and decay of J."""
        return summarise(self.j)

    @property
    def f_summary(self) -> Summary:
        """Mean, recall and decay of F."""
        return summarise(self.f)

    @property
    def j_and_f(self) -> float:
        """J&F: the mean of mean J and mean F."""
        return (self.j_summary.mean + self.f_summary.mean) / 2


def j_and_f(
    gt: ArrayLike,
    pred: ArrayLike,
    *,
    void: ArrayLike | None = None,
    tolerance: float = 0.008,
    exclude_ends: bool = True,
) -> MaskScores:
    """Score one object, ``(T, H, W)`` boolean, over a clip, without its first and last frame.

    Raises:
        FrameError: masks of different shapes or not boolean, or too few frames.
    """
    clips = [np.asarray(clip) for clip in (gt, pred, *(() if void is None else (void,)))]
    ends = 1 if exclude_ends else 0
    if any(clip.ndim != 3 or clip.shape != clips[0].shape for clip in clips) or (
        len(clips[0]) <= 2 * ends
    ):
        shapes = ", ".join(str(clip.shape) for clip in clips)
        raise FrameError(f"got masks of shapes {shapes}, expected (T, H, W), T at least 3")
    frames = range(len(clips[0]))[ends : len(clips[0]) - ends]
    rows = [[clip[t] for clip in clips] + [None] * (3 - len(clips)) for t in frames]
    return MaskScores(
        tuple(region_similarity(truth, guess, void=out) for truth, guess, out in rows),
        tuple(boundary_f(truth, guess, tolerance, void=out) for truth, guess, out in rows),
    )


def mean_over_videos(videos: Iterable[TapVidMetrics]) -> TapVidMetrics:
    """Return the mean over videos; one in which a figure is NaN does not count for it.

    Raises:
        ValueError: no videos.
    """
    found = list(videos)
    if not found:
        raise ValueError("got no videos to average; expected at least one")
    return TapVidMetrics(
        mean(video.delta_avg for video in found),
        mean(video.occlusion_accuracy for video in found),
        mean(video.average_jaccard for video in found),
        {t: mean(video.pts_within[t] for video in found) for t in THRESHOLDS},
        {t: mean(video.jaccard[t] for video in found) for t in THRESHOLDS},
    )
