"""Features of a video of any length at constant memory: encode, settle and fuse chunk by chunk."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from torch import Tensor

from cosettle_adapter.closed_form import Settler
from cosettle_adapter.correspondence import TemporalFusion
from cosettle_adapter.errors import TruncatedVideoError
from cosettle_adapter.features import Encoded
from cosettle_adapter.video import FrameChunk, Geometry, prefetch


@dataclasses.dataclass(frozen=True)
class FeatureChunk:
    """Features of consecutive frames of a stream."""

    features: Tensor  # (N, C, h, w)
    timestamps: Tensor  # (N,) float64, seconds
    geometry: Geometry  # how patches map to pixels of the source's frames
    start: int  # number of frames delivered before this chunk
    backbone: Tensor | None = None  # (N, C', h, w) tokens before the projection, if asked for


def stream_features(
    chunks: Generator[FrameChunk, None, None],
    encode: Callable[[Tensor], Encoded],
    settler: Settler | None,
    fusion: TemporalFusion | None,
    *,
    guide: Callable[[Tensor], Tensor],
    keep_tokens: bool,
) -> Iterator[FeatureChunk]:
    """Yield the features of chunks of frames in order, which are decoded ahead in a thread.

    ``settler`` settles every frame by those up to it, ``fusion`` then fuses them by what ``guide``
    makes of their tokens: chunks come when their last frame is fused. ``keep_tokens`` fills
    ``chunk.backbone``.
    """

    def encoded() -> Iterator[tuple[FeatureChunk, Tensor]]:
        for chunk in prefetch(chunks):
            tokens, features, geometry = encode(chunk.frames)
            if settler is not None:
                features = settler.settle(features)
            kept = tokens if keep_tokens else None
            yield FeatureChunk(features, chunk.timestamps, geometry, chunk.start, kept), tokens

    if fusion is None:
        return (chunk for chunk, _ in encoded())
    return _fused(((chunk, guide(tokens)) for chunk, tokens in encoded()), fusion)


def _fused(
    chunks: Iterable[tuple[FeatureChunk, Tensor]], fusion: TemporalFusion
) -> Iterator[FeatureChunk]:
    """Fuse the features of chunks, each given with its guide."""
    waiting: collections.deque[FeatureChunk] = collections.deque()
    ready: list[Tensor] = []

    def complete() -> Iterator[FeatureChunk]:
        while waiting and len(ready) >= (frames := len(waiting[0].timestamps)):
            features = torch.stack(ready[:frames])
            del ready[:frames]
            yield dataclasses.replace(waiting.popleft(), features=features)

    broken: TruncatedVideoError | None = None
    try:
        for chunk, guide in chunks:
            ready.extend(fusion.push(chunk.features, guide))
            # without the features, which would be held for nothing
            waiting.append(dataclasses.replace(chunk, features=chunk.features.new_empty(0)))
            yield from complete()
    except TruncatedVideoError as error:
        broken = error
    ready.extend(fusion.flush())
    yield from complete()
    if broken is not None:
        raise broken
