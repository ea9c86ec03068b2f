"""Streams of features: encode videos in full batches, then settle and fuse each video."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from cosettle_adapter.backbones.backbone import Read
from cosettle_adapter.closed_form import Settler
from cosettle_adapter.correspondence import FusionMode, TemporalFusion
from cosettle_adapter.errors import GeometryError, MissingExtraError, StatisticsError
from cosettle_adapter.features import FeatureModel, Size
from cosettle_adapter.video import Fit, FrameChunk, Geometry, pinned, prefetch
from cosettle_adapter.video.geometry import check_side
from cosettle_adapter.video.reader import name_of, other_size

if TYPE_CHECKING:
    from cosettle_adapter.upsampling import DenseSize, Upsampler

Source = TypeVar("Source")
Chunks = Generator[FrameChunk, None, None]


@dataclasses.dataclass(frozen=True)
class FeatureChunk:
    """Features of consecutive frames of a stream."""

    features: Tensor  # (N, C, h, w); (N, C, H, W) with ``dense``
    timestamps: Tensor  # (N,) float64, seconds
    geometry: Geometry  # how patches map to pixels of the source's frames
    start: int  # number of frames delivered before this chunk
    backbone: Tensor | None = None  # (N, C', h, w) tokens before the projection, on request
    lost: tuple[float, ...] = ()  # seconds of frames lost to damage, in or next to this chunk
    cls: Tensor | None = None  # (N, C') class tokens, on request, if the backbone has one
    registers: Tensor | None = None  # (N, R, C') register tokens, likewise


class StreamOptions(TypedDict, total=False):
    """Options of ``CoSettleAdapter.stream``, which describes them, and of ``stream_many``."""

    size: Size | None
    fit: Fit
    normalize: bool
    return_backbone: bool
    return_special: bool
    settle: bool | None
    forgetting: float
    temporal_fusion: FusionMode | None
    dense: DenseSize | None
    upsampler: Upsampler


def stream_videos(
    model: FeatureModel,
    videos: Iterable[tuple[Source, Chunks]],
    options: StreamOptions,
    *,
    batch_size: int,
    on_error: Callable[[Source, Exception], None] | None = None,
) -> Iterator[tuple[Source, FeatureChunk]]:
    """Encode pairs of a source and its frames as ``CoSettleAdapter.stream`` describes.

    An error in a video is raised, or passed to ``on_error``, after the features before it.
    """
    if unknown := ", ".join(options.keys() - StreamOptions.__annotations__.keys()):
        raise TypeError(f"got {unknown}, expected {', '.join(StreamOptions.__annotations__)}")
    check_side("batch_size", batch_size)
    _new_state(model, options)  # raises at once for unusable settings
    batches = _batches(_pieces(model, videos, options), batch_size)

    def results() -> Iterator[tuple[Source, FeatureChunk]]:
        with contextlib.closing(_encoded(model, batches, options)) as encoded:
            for video, items in itertools.groupby(encoded, key=itemgetter(0)):
                finished = _settled_and_fused(
                    model, map(itemgetter(1), items), options, name_of(video.source)
                )
                for chunk in finished:
                    if isinstance(chunk, FeatureChunk):
                        yield video.source, chunk
                    elif on_error is not None:
                        on_error(video.source, chunk)
                    else:
                        try:
                            raise chunk
                        finally:
                            del chunk, finished  # breaks the cycle of an error and its traceback

    return results()


def _new_state(
    model: FeatureModel, options: StreamOptions
) -> tuple[Settler | None, TemporalFusion | None]:
    settles = options.get("settle")
    settles = model.settles if settles is None else settles
    forgetting = options.get("forgetting", 1.0)
    settler = Settler(model.width, forgetting=forgetting) if settles else None
    mode = options.get("temporal_fusion")
    return settler, None if mode is None else TemporalFusion(mode)


@dataclasses.dataclass(frozen=True, eq=False)
class _Video:
    """A source, compared by identity: one source can come twice."""

    source: Any


class _Piece(NamedTuple):
    """Frames of a chunk that are encoded in one batch: all of them, or some."""

    video: _Video
    chunk: FrameChunk
    frames: Tensor
    geometry: Geometry


class _Failed(NamedTuple):
    """The error that ends a video, in place of its remaining frames."""

    video: _Video
    error: Exception


class _Encoded(NamedTuple):
    """A chunk before settling and fusion, and their inputs."""

    chunk: FeatureChunk
    tokens: Tensor
    frames: Tensor | None  # for guided upsampling


def _pieces(
    model: FeatureModel, videos: Iterable[tuple[Any, Chunks]], options: StreamOptions
) -> Iterator[_Piece | _Failed]:
    """Read videos one after the other; an error ends only its own video."""
    size, fit = options.get("size"), options.get("fit", "resize")
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
                        seconds, name = chunk.timestamps[0].item(), name_of(source)
                        raise other_size(
                            geometry.frame, first=first.frame, seconds=seconds, name=name
                        )
                    yield _Piece(video, chunk, chunk.frames, geometry)
                    del chunk  # not kept alive while the next is read
        except MissingExtraError:  # fails for every video
            raise
        except GeometryError as error:
            yield _Failed(video, GeometryError(f"{name_of(source)}: {error}"))
        except Exception as error:
            yield _Failed(video, error)


def _batches(
    pieces: Iterable[_Piece | _Failed], batch_size: int
) -> Iterator[list[_Piece] | _Failed]:
    """Fill batches across videos with frames that become images of one size."""
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
    model: FeatureModel, batches: Iterable[list[_Piece] | _Failed], options: StreamOptions
) -> Generator[tuple[_Video, _Encoded | Exception], None, None]:
    """Encode batches and join the parts of split chunks."""
    kinds = model.backbone.special if options.get("return_special") else ()
    special = [Read(model.backbone.default_layer, kind=kind) for kind in kinds]
    guided = options.get("dense") is not None and options.get("upsampler") == "guided"
    parts: list[tuple[Tensor, ...]] = []  # tokens, features and special tokens of the next chunk
    for batch in prefetch(batches):
        if isinstance(batch, _Failed):
            yield batch
            continue
        counts = [len(piece.frames) for piece in batch]
        images = [model._prepare(piece.frames, piece.geometry) for piece in batch]
        joined = images[0] if len(images) == 1 else torch.cat(images)
        tokens, features, extra = model._encode_images(joined, special)
        maps = [torch.split(output, counts) for output in (tokens, features, *extra)]
        del images, joined  # not kept alive while chunks wait for the consumer
        for piece, *piece_maps in zip(batch, *maps, strict=True):
            parts.append(tuple(piece_maps))
            chunk, geometry = piece.chunk, piece.geometry
            if sum(len(part[0]) for part in parts) < len(chunk.frames):
                continue
            if len(batch) > 1 or len(parts) > 1:  # copies: views would keep other videos alive
                piece_maps = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
            parts.clear()
            tokens, features, *extra = piece_maps
            named = dict(zip(kinds, extra, strict=True))
            times, start = chunk.timestamps, chunk.start
            result = FeatureChunk(features, times, geometry, start, lost=chunk.lost, **named)
            yield piece.video, _Encoded(result, tokens, chunk.frames if guided else None)


def _settled_and_fused(
    model: FeatureModel, items: Iterable[_Encoded | Exception], options: StreamOptions, name: str
) -> Iterator[FeatureChunk | Exception]:
    """Settle and fuse the chunks of one video; yield its error, if any, last."""
    settler, fusion = _new_state(model, options)
    waiting: collections.deque[_Encoded] = collections.deque()
    ready: list[Tensor] = []
    failure: Exception | None = None

    def finished(item: _Encoded, features: Tensor) -> FeatureChunk:
        features = model._finished(
            features,
            options.get("normalize", False),
            item.chunk.geometry,
            item.frames,
            options.get("dense"),
            options.get("upsampler", "bilinear"),
        )
        backbone = item.tokens if options.get("return_backbone") else None
        return dataclasses.replace(item.chunk, features=features, backbone=backbone)

    def complete() -> Iterator[FeatureChunk]:
        while waiting and len(ready) >= (frames := len(waiting[0].chunk.timestamps)):
            features = torch.stack(ready[:frames])
            del ready[:frames]
            yield finished(waiting.popleft(), features)

    for item in items:
        if isinstance(item, Exception):
            failure = item
            break
        features = item.chunk.features
        if settler is not None:
            try:
                features = settler.settle(features)
            except StatisticsError as error:
                failure = StatisticsError(f"{name}: {error}")
                break
        if fusion is None:
            yield finished(item, features)
            continue
        ready.extend(fusion.push(features, model._guide(item.tokens)))
        empty = features.new_empty(0)  # frees the memory of unfused features
        tokens = item.tokens if options.get("return_backbone") else empty
        chunk = dataclasses.replace(item.chunk, features=empty)
        waiting.append(item._replace(chunk=chunk, tokens=tokens))
        yield from complete()
    if fusion is not None:
        ready.extend(fusion.flush())
        yield from complete()
    if failure is not None:
        yield failure
