"""Frames through an adapter into a feature file, at constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.adapter import DEFAULT_BATCH_SIZE, CoSettleAdapter, FeatureChunk, Size
from cosettle_adapter.errors import FrameError, TruncatedVideoError
from cosettle_adapter.feature_file import FeatureWriter, write_features
from cosettle_adapter.frames.geometry import Fit
from cosettle_adapter.version import __version__


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What :func:`extract` wrote.

    Attributes:
        path: the feature file.
        frames: number of frames in it.
        shape: ``(C, h, w)`` of one frame's features.
        truncated: why the source ended early, or ``None`` if it was read to its end.
    """

    path: Path
    frames: int
    shape: tuple[int, int, int]
    truncated: str | None = None


def extract(
    adapter: CoSettleAdapter,
    source: Any,
    destination: str | Path,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    size: Size | None = None,
    fit: Fit = "resize",
    start: float | None = None,
    end: float | None = None,
    every: int = 1,
    max_frames: int | None = None,
    fps: float | None = None,
    storage: torch.dtype | None = None,
    on_chunk: Callable[[int], None] = lambda frames: None,
) -> Extraction:
    """Write the features of a video of any length to a safetensors file.

    The file appears whole or not at all. When the source breaks off, the features of its
    readable frames are kept and the result says so.

    Args:
        adapter: what computes the features.
        source: as in :meth:`CoSettleAdapter.stream`, like the options up to ``fps``.
        destination: the file to write.
        batch_size: frames a forward pass.
        size: what frames are resized to.
        fit: what happens to sides that are not whole patches.
        start: first second to read.
        end: second to stop before.
        every: keep every n-th frame.
        max_frames: keep at most this many frames.
        fps: frames per second of sources without timestamps.
        storage: dtype of the stored features; the adapter's by default.
        on_chunk: called with the number of frames written so far after every chunk.

    Raises:
        FrameError: not a single frame could be read.
        OSError: the file could not be written; an earlier one of that name is left as it was.
    """
    chunks = adapter.stream(
        source,
        batch_size=batch_size,
        size=size,
        fit=fit,
        start=start,
        end=end,
        every=every,
        max_frames=max_frames,
        fps=fps,
    )
    metadata = _metadata(adapter, source)
    truncated: str | None = None
    writer: FeatureWriter | None = None
    shape = (0, 0, 0)
    with contextlib.ExitStack() as stack:
        stack.callback(chunks.close)  # type: ignore[attr-defined]
        try:
            for chunk in chunks:
                if writer is None:
                    shape = _map_shape(chunk)
                    writer = stack.enter_context(
                        write_features(destination, chunk.geometry, metadata)
                    )
                writer.append(chunk.features.to(storage or adapter.dtype), chunk.timestamps)
                on_chunk(writer.frames)
        except TruncatedVideoError as error:
            if writer is None:
                raise
            truncated = str(error)
        if writer is None:
            raise FrameError(f"{source} has no frames in the range asked for")
        frames = writer.frames
    return Extraction(Path(destination), frames, shape, truncated)


def _map_shape(chunk: FeatureChunk) -> tuple[int, int, int]:
    _, channels, height, width = chunk.features.shape
    return channels, height, width


def _metadata(adapter: CoSettleAdapter, source: Any) -> dict[str, str]:
    named = isinstance(source, str | Path)
    return {
        "source": Path(source).name if named else type(source).__name__,
        "backbone": adapter.backbone.row.name,
        "fingerprint": adapter.backbone.fingerprint,
        "layers": json.dumps(adapter.config.layers),
        "fit_method": str(adapter.config.fit.get("method", "")),
        "cosettle_adapter": __version__,
    }
