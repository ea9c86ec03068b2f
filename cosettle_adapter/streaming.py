"""Streams of features: videos are encoded in full batches, then settled and fused one by one."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cosettle_adapter.closed_form import Settler
from cosettle_adapter.correspondence import FusionMode, TemporalFusion
from cosettle_adapter.errors import FrameError, GeometryError, MissingExtraError, StatisticsError
from cosettle_adapter.features import FeatureModel, Size
from cosettle_adapter.video import Fit, FrameChunk, Geometry, pinned, prefetch
from cosettle_adapter.video.reader import name_of

Source = TypeVar("Source")
Chunks = Generator[FrameChunk, None, None]


@dataclasses.dataclass(frozen=True)
class FeatureChunk:
    """Features of consecutive frames of a stream."""

    features: Tensor  # (N, C, h, w)
    timestamps: Tensor  # (N,) float64, seconds
    geometry: Geometry  # how patches map to pixels of the source's frames
    start: int  # number of frames delivered before this chunk
    backbone: Tensor | None = None  # (N, C', h, w) tokens before the projection, on request
    lost: tuple[float, ...] = ()  # seconds of frames that damage took, in this chunk or around it


def stream_videos(
    model: FeatureModel,
    videos: Iterable[tuple[Source, Chunks]],
    *,
    batch_size: int,
    size: Size | None,
    fit: Fit,
    normalize: bool,
    return_backbone: bool,
    settle: bool | None,
    forgetting: float,
    temporal_fusion: FusionMode | None,
    on_error: Callable[[Source, Exception], None] | None = None,
) -> Iterator[tuple[Source, FeatureChunk]]:
    """Encode videos, given as sources and their frames, as ``CoSettleAdapter.stream`` describes.

    The videos are read ahead in a thread. What fails in reading one is raised after the features of
    all frames before it, or given to ``on_error`` in its place.
    """
    settles = model.settles if settle is None else settle

    def new_state() -> tuple[Settler | None, TemporalFusion | None]:
        settler = Settler(model.width, forgetting=forgetting) if settles else None
        return settler, None if temporal_fusion is None else TemporalFusion(temporal_fusion)

    new_state()  # raises at once for unusable settings
    batches = _batches(_pieces(model, videos, size=size, fit=fit), batch_size)

    def results() -> Iterator[tuple[Source, FeatureChunk]]:
        with contextlib.closing(_encoded(model, batches)) as encoded:
            for video, items in itertools.groupby(encoded, key=itemgetter(0)):
                finished = _settled_and_fused(
                    model,
                    map(itemgetter(1), items),
                    *new_state(),
                    name=name_of(video.source),
                    tokens=return_backbone,
                )
                for chunk in finished:
                    if isinstance(chunk, FeatureChunk):
                        features = model._finished(chunk.features, normalize)
                        yield video.source, dataclasses.replace(chunk, features=features)
                    elif on_error is not None:
                        on_error(video.source, chunk)
                    else:
                        try:
                            raise chunk
                        finally:
                            del chunk, finished  # breaks the cycle of an error and its traceback

    return results()


@dataclasses.dataclass(frozen=True, eq=False)
class _Video:
    source: Any


class _Piece(NamedTuple):
    """Frames of a chunk that are encoded in one batch: all of them, or some."""

    video: _Video
    chunk: FrameChunk
    frames: Tensor
    geometry: Geometry


class _Failed(NamedTuple):
    """In place of the rest of a video, why it cannot be read."""

    video: _Video
    error: Exception


def _pieces(
    model: FeatureModel, videos: Iterable[tuple[Any, Chunks]], *, size: Size | None, fit: Fit
) -> Iterator[_Piece | _Failed]:
    """Read videos one after the other; a failure ends only its own."""
    for source, chunks in videos:
        video = _Video(source)
        first: Geometry | None = None
        try:
            frames = pinned(chunks) if model.device.type == "cuda" else chunks
            with contextlib.closing(frames):
                for chunk in frames:
                    geometry = model.geometry(*chunk.frames.shape[-2:], size=size, fit=fit)
                    first = first or geometry
                    if geometry.grid != first.grid:
                        raise FrameError(
                            f"{name_of(source)}: the frame at {chunk.timestamps[0]:g} s is "
                            f"{geometry.frame[0]} x {geometry.frame[1]}, but the first is "
                            f"{first.frame[0]} x {first.frame[1]}; give a size (height, width) to "
                            "resize all to"
                        )
                    yield _Piece(video, chunk, chunk.frames, geometry)
                    del chunk  # not kept alive while the next is read
        except MissingExtraError:  # would fail for every video
            raise
        except GeometryError as error:
            yield _Failed(video, GeometryError(f"{name_of(source)}: {error}"))
        except Exception as error:
            yield _Failed(video, error)


def _batches(
    pieces: Iterable[_Piece | _Failed], batch_size: int
) -> Iterator[list[_Piece] | _Failed]:
    """Fill batches with frames that become images of one size, whatever videos they are from."""
    batch: list[_Piece] = []
    for piece in pieces:
        image = None if isinstance(piece, _Failed) else piece.geometry.padded
        if batch and image != batch[0].geometry.padded:
            yield batch
            batch = []
        if isinstance(piece, _Failed):
            yield piece
            continue
        frames = piece.frames
        while len(frames):
            room = batch_size - sum(len(other.frames) for other in batch)
            batch.append(piece._replace(frames=frames[:room]))
            if len(frames) >= room:
                yield batch
                batch = []
            frames = frames[room:]
        del piece, frames  # not kept alive while the next is read
    if batch:
        yield batch


def _encoded(
    model: FeatureModel, batches: Iterable[list[_Piece] | _Failed]
) -> Generator[tuple[_Video, FeatureChunk | Exception], None, None]:
    """Encode batches, and put chunks that were divided together again."""
    parts: list[tuple[Tensor, Tensor]] = []  # tokens and features of the next chunk
    for batch in prefetch(batches):
        if isinstance(batch, _Failed):
            yield batch
            continue
        counts = [len(piece.frames) for piece in batch]
        maps = (torch.split(of_batch, counts) for of_batch in _encode(model, batch))
        for piece, tokens, features in zip(batch, *maps, strict=True):
            parts.append((tokens, features))
            chunk, geometry = piece.chunk, piece.geometry
            if sum(len(part) for part, _ in parts) < len(chunk.frames):
                continue
            if len(batch) > 1 or len(parts) > 1:  # not views of the memory of other videos
                tokens, features = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
            parts.clear()
            result = FeatureChunk(
                features, chunk.timestamps, geometry, chunk.start, tokens, chunk.lost
            )
            yield piece.video, result


def _encode(model: FeatureModel, batch: list[_Piece]) -> tuple[Tensor, Tensor]:
    """Tokens and features of the frames of a batch."""
    images = [model._normalize(piece.frames, piece.geometry) for piece in batch]
    return model._encode_images(images[0] if len(images) == 1 else torch.cat(images))


def _settled_and_fused(
    model: FeatureModel,
    chunks: Iterable[FeatureChunk | Exception],
    settler: Settler | None,
    fusion: TemporalFusion | None,
    *,
    name: str,
    tokens: bool,
) -> Iterator[FeatureChunk | Exception]:
    """Settle and fuse the chunks of one video; what it failed with comes last."""
    waiting: collections.deque[FeatureChunk] = collections.deque()
    ready: list[Tensor] = []
    failure: Exception | None = None

    def complete() -> Iterator[FeatureChunk]:
        while waiting and len(ready) >= (frames := len(waiting[0].timestamps)):
            features = torch.stack(ready[:frames])
            del ready[:frames]
            yield dataclasses.replace(waiting.popleft(), features=features)

    for chunk in chunks:
        if isinstance(chunk, Exception):
            failure = chunk
            break
        features, backbone = chunk.features, chunk.backbone
        if settler is not None:
            try:
                features = settler.settle(features)
            except StatisticsError as error:
                failure = StatisticsError(f"{name}: {error}")
                break
        if fusion is not None and backbone is not None:
            ready.extend(fusion.push(features, model._guide(backbone)))
            features = features.new_empty(0)  # frees the memory of the unfused ones
        kept = backbone if tokens else None
        waiting.append(dataclasses.replace(chunk, features=features, backbone=kept))
        if fusion is None:
            yield waiting.popleft()
        else:
            yield from complete()
    if fusion is not None:
        ready.extend(fusion.flush())
        yield from complete()
    if failure is not None:
        yield failure
