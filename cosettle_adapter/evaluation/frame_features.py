"""One feature a frame, the mean over its patches, before and after the projection."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter.evaluation.encoding import Source, each_readable, encoded_chunks, step_of
from cosettle_adapter.evaluation.segments import Segment

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter, Size
    from cosettle_adapter.analysis import FeatureKind


@dataclasses.dataclass(frozen=True, eq=False)
class VideoFrames:
    """One feature a frame of a video.

    Attributes:
        video: its name in the segments.
        times: ``(T,)`` seconds.
        features: kind of features to ``(T, C)``.
    """

    video: str
    times: Tensor
    features: Mapping[str, Tensor]


def frame_features(
    adapter: CoSettleAdapter,
    source: Source,
    *,
    every: int = 1,
    max_frames: int | None = None,
    size: Size | None = 224,
    batch_size: int = 8,
    kinds: Sequence[FeatureKind] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Encode a video of any length into one feature a frame, the mean over its patches.

    Args:
        adapter: backbone and projection.
        source: a video file, or a folder or glob of images.
        every: keep every n-th frame.
        max_frames: keep at most this many.
        size: what frames are resized to.
        batch_size: frames a forward pass.
        kinds: as for :func:`~cosettle_adapter.evaluation.encoding.encoded_chunks`.

    Returns:
        Kind of features to ``(T, C)`` float32, and times ``(T,)`` float64 in seconds.

    Raises:
        FrameError: a source that cannot be read to its end.
    """
    pooled: dict[str, list[Tensor]] = {}
    times: list[Tensor] = []
    for chunk in encoded_chunks(
        adapter,
        source,
        every=every,
        max_frames=max_frames,
        size=size,
        batch_size=batch_size,
        kinds=kinds,
    ):
        for name, maps in chunk.features.items():
            pooled.setdefault(name, []).append(reduce(maps, "t c h w -> t c", "mean"))
        times.append(chunk.times)
    return {name: torch.cat(parts) for name, parts in pooled.items()}, torch.cat(times)


def encode_videos(
    adapter: CoSettleAdapter,
    root: str | os.PathLike[str],
    segments: Sequence[Segment],
    *,
    rate: float = 4.0,
    size: Size | None = 224,
    batch_size: int = 8,
    kinds: Sequence[FeatureKind] | None = None,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[VideoFrames], dict[str, str]]:
    """Encode the videos that segments name.

    Args:
        adapter: backbone and projection.
        root: folder that the names are below.
        segments: see :func:`~cosettle_adapter.evaluation.segments.read_segments`.
        rate: about how many frames a second to take; all of image folders, whose times are
            positions.
        size: what frames are resized to.
        batch_size: frames a forward pass.
        kinds: as for :func:`~cosettle_adapter.evaluation.encoding.encoded_chunks`.
        on_video: called with the number of videos done and their number.

    Returns:
        Videos that could be read, and name to why of those that could not.

    Raises:
        FrameError: no video could be read.
        MissingExtraError: PyAV or Pillow is needed and not installed.
    """
    root = Path(root).expanduser()
    names = list(dict.fromkeys(segment.video for segment in segments))
    skipped: dict[str, str] = {}

    def read(name: str) -> VideoFrames:
        path = root / name
        every = step_of(path, rate=rate)
        features, times = frame_features(
            adapter, path, every=every, size=size, batch_size=batch_size, kinds=kinds
        )
        return VideoFrames(name, times, features)

    return each_readable(names, read, skipped, on_video), skipped
