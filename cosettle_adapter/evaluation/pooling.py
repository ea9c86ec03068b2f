"""One feature a video: mean over patches and frames, before and after the projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.analysis import CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.evaluation.encoding import each_readable, step_of
from cosettle_adapter.evaluation.frame_features import frame_features
from cosettle_adapter.evaluation.labelled_videos import LabelledVideo

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter, Size
    from cosettle_adapter.analysis import FeatureKind


@dataclasses.dataclass(frozen=True, eq=False)
class PooledVideos:
    """Pooled features of labelled videos.

    Attributes:
        videos: those that could be read.
        features: kind of features to ``(V, C)`` float32, a row for each of ``videos``.
        skipped: name to why, of those that could not.
    """

    videos: tuple[LabelledVideo, ...]
    features: Mapping[str, Tensor]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The class of each row."""
        return [video.label for video in self.videos]


def pool_videos(
    adapter: CoSettleAdapter,
    videos: Sequence[LabelledVideo],
    *,
    frames: int = 16,
    size: Size | None = 224,
    batch_size: int = 8,
    kinds: Sequence[FeatureKind] | None = None,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> PooledVideos:
    """Encode videos, one pass of the backbone for all kinds of features.

    Args:
        adapter: backbone and projection.
        videos: see :func:`~cosettle_adapter.evaluation.labelled_videos.labelled_videos`.
        frames: about how many of a video, evenly spread over it.
        size: what frames are resized to; the shorter side by default.
        batch_size: frames a forward pass.
        kinds: as for :func:`~cosettle_adapter.evaluation.encoding.encoded_chunks`.
        on_video: called with the number of videos done and their number.

    Returns:
        ``raw last block``, ``raw same block`` where that is another, and ``adapted``. Centred
        features need a reference: :func:`with_centred`.

    Raises:
        FrameError: no video could be read.
        MissingExtraError: PyAV or Pillow is needed and not installed.
    """
    skipped: dict[str, str] = {}

    def read(video: LabelledVideo) -> tuple[LabelledVideo, dict[str, Tensor]]:
        every = step_of(video.path, frames=frames)
        pooled, _ = frame_features(
            adapter,
            video.path,
            every=every,
            max_frames=frames,
            size=size,
            batch_size=batch_size,
            kinds=kinds,
        )
        return video, {name: reduce(values, "t c -> c", "mean") for name, values in pooled.items()}

    kept = each_readable(videos, read, skipped, on_video)
    features = {name: torch.stack([row[name] for _, row in kept]) for name in kept[0][1]}
    return PooledVideos(tuple(video for video, _ in kept), features, skipped)


def with_centred(
    features: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the centred features beside the others: raw ones minus the mean of a reference.

    A video's own mean would leave nothing of a pooled feature, so it is the mean of the videos
    that are learnt from or searched; it uses no labels.

    Args:
        features: kind to ``(N, C)``.
        reference: kind to ``(M, C)``, whose mean is taken off.

    Returns:
        The features in the order raw, centred, all others.
    """
    same = RAW_SAME if RAW_SAME in features else RAW_LAST
    if same not in features:
        return dict(features)
    raw = {name: features[name] for name in (RAW_LAST, RAW_SAME) if name in features}
    return {**raw, CENTRED: features[same] - reference[same].mean(dim=0), **features}
