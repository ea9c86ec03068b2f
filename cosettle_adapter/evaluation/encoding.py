"""Videos as features before and after the projection, a chunk of frames at a time."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from cosettle_adapter.analysis import FeatureKind, feature_kinds, read_blocks
from cosettle_adapter.errors import CosettleError, FrameError, MissingExtraError
from cosettle_adapter.video import open_frames, probe

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter, Size

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str]
Frames = Source | Iterable[Any]  # or frames one by one
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedChunk:
    """Features of consecutive frames.

    Attributes:
        features: kind of features to ``(N, C, h, w)`` float32 on the CPU; without those that
            need a whole clip, as the centred ones do.
        times: ``(N,)`` float64 seconds.
        frames: ``(N, 3, H, W)`` uint8, what was encoded before it was resized.
    """

    features: dict[str, Tensor]
    times: Tensor
    frames: Tensor


def encoded_chunks(
    adapter: CoSettleAdapter,
    source: Frames,
    *,
    every: int = 1,
    max_frames: int | None = None,
    size: Size | None = None,
    crop: float | None = None,
    batch_size: int = 8,
    kinds: Sequence[FeatureKind] | None = None,
) -> Iterator[EncodedChunk]:
    """Encode a video chunk by chunk, each in one pass of the backbone.

    Args:
        adapter: backbone and projection.
        source: a video file, a folder or glob of images, or frames one by one.
        every: keep every n-th frame.
        max_frames: keep at most this many.
        size: what frames are resized to, as in the adapter's ``forward``.
        crop: side of a central square, as a share of the short side; by default whole frames.
        batch_size: frames a chunk.
        kinds: those of :func:`~cosettle_adapter.analysis.feature_kinds` by default.

    Raises:
        FrameError: a source that cannot be read to its end.
    """
    kinds = [kind for kind in kinds or feature_kinds(adapter) if not kind.needs_clip]
    wanted = [kind.blocks for kind in kinds]
    chunks = open_frames(source, every=every, max_frames=max_frames, chunk_size=batch_size)
    for chunk in chunks:
        frames = chunk.frames if crop is None else central_square(chunk.frames, crop)
        tokens = read_blocks(adapter.backbone, adapter.preprocess(frames, size=size), wanted)
        features = {kind.name: kind.of_frames(tokens[kind.blocks]).cpu() for kind in kinds}
        yield EncodedChunk(features, chunk.timestamps, frames)


def central_square(frames: Tensor, share: float = 1.0) -> Tensor:
    """Cut the central square out of frames ``(N, 3, H, W)``: ``share`` times the short side.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"got a crop of {share}, expected a share of the short side in (0, 1]")
    height, width = frames.shape[-2:]
    side = max(1, round(share * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return frames[..., top : top + side, left : left + side]


def step_of(source: Source, *, frames: int | None = None, rate: float | None = None) -> int:
    """Return which every n-th frame to take of a source.

    Args:
        source: a video file, or a folder or glob of images.
        frames: spread about this many evenly over the whole source.
        rate: take about this many a second, where the source has times of its own; all of them
            where it has not.

    Raises:
        FrameError: a source that cannot be read.
        ValueError: ``frames`` below 1 or a ``rate`` that is not positive.
    """
    if (frames is not None and frames < 1) or (rate is not None and not rate > 0):
        raise ValueError(f"got frames={frames} and rate={rate}, expected both above 0")
    info = probe(source)
    if frames is not None:
        return max(1, (info.frames or 0) // frames)
    return max(1, round(info.fps / rate)) if info.fps and rate else 1


def each_readable(
    items: Sequence[Item],
    read: Callable[[Item], Found],
    skipped: dict[str, str],
    on_item: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """Read items one by one; one that cannot be read does not lose the others.

    Args:
        items: what to read; ``str`` of it is its name.
        read: reads one.
        skipped: name to why, filled for those that failed.
        on_item: called with the number of items done, read or not, and their number.

    Returns:
        What was read, in order.

    Raises:
        MissingExtraError: what would fail for every item alike.
        FrameError: not a single item could be read, or there is none.
    """
    found = []
    for done, item in enumerate(items, start=1):
        try:
            found.append(read(item))
        except MissingExtraError:
            raise
        except (CosettleError, OSError) as error:
            logger.warning("skipped %s: %s", item, error)
            skipped[str(item)] = str(error)
        on_item(done, len(items))
    if not items:
        raise FrameError("got no videos to read; expected at least one")
    if not found:
        name, why = next(iter(skipped.items()))
        raise FrameError(f"none of {len(items)} videos could be read. The first, {name}: {why}")
    return found


def joined(chunks: Iterable[EncodedChunk]) -> tuple[dict[str, Tensor], Tensor]:
    """Features and times of all chunks, each one tensor."""
    # Chunks hold frames as well, which would pile up.
    parts = [(chunk.features, chunk.times) for chunk in chunks]
    features = {name: torch.cat([found[name] for found, _ in parts]) for name in parts[0][0]}
    return features, torch.cat([times for _, times in parts])
