"""What a format of feature files has to do: append batches, read them back, become whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cosettle_adapter.video.geometry import Geometry

if TYPE_CHECKING:
    from cosettle_adapter.adapter import CoSettleAdapter
    from cosettle_adapter.extraction.settings import Settings


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is known of the features before the first batch is written.

    Attributes:
        shape: ``(C, h, w)`` of one frame.
        dtype: of the stored features.
        batch: frames of every :meth:`Store.append` but the last, which may have fewer.
        geometry: how cells map to pixels.
        metadata: JSON-ready description: model, fingerprint, layers, settings, versions.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    batch: int
    geometry: Geometry
    metadata: Mapping[str, Any]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's features."""
        channels, height, width = self.shape
        return channels * height * width * self.dtype.itemsize


class Store(Protocol):
    """Features under construction, in a file or folder under a temporary name.

    One thread uses a store. A kill may come at any moment, also within :meth:`append`; what it
    leaves behind is brought back to whole batches by :meth:`keep`. The bytes of the finished
    store depend on the layout and on the frames alone, never on how often it was interrupted.
    """

    def append(self, features: Tensor) -> None:
        """Append ``(N, C, h, w)`` features on the CPU, contiguous, in the layout's dtype."""

    def flush(self) -> None:
        """Hand what was appended to the system, so that it outlives this process."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return ``(N, C, h, w)``: frames ``start`` to ``stop`` of an earlier process.

        Raises:
            ValueError, OSError: they are not all there.
        """

    def keep(self, frames: int) -> None:
        """Forget all but the first ``frames``; appending goes on behind them."""

    def finish(self, timestamps: Tensor) -> None:
        """Make it whole: the ``(T,)`` float64 timestamps are those of all frames appended."""

    def close(self) -> None:
        """Release what is open; called in any case, also after an error and twice."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a feature file says of itself without its sidecar."""

    timestamps: Tensor
    geometry: Geometry
    metadata: Mapping[str, Any]


def _as_they_are(features: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    return features, geometry


def _unchanged(adapter: CoSettleAdapter, settings: Settings) -> Settings:
    del adapter
    return settings


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Attributes:
        name: what ``--format`` calls it.
        suffix: of its files, with the dot; tells the format of ``-o clip.zarr`` too.
        summary: for the help text.
        dtypes: what it can store, the default first unless the adapter's own is among them.
        open: opens the store at a path, which is created if it is not there; its parent is a
            folder for scratch files, which go when the output is whole.
        read: returns frames ``start`` to ``stop`` (``None`` for all) of a finished file.
        describe: what the file says of itself, for formats that carry it.
        plan: fills in, or refuses, settings that the format dictates, such as the frame size.
        arrange: what becomes of a batch ``(N, C, h, w)``, on the adapter's device, before it is
            stored: resampled, padded with channels.
    """

    name: str
    suffix: str
    summary: str
    dtypes: tuple[torch.dtype, ...]
    open: Callable[[Path, Layout], Store]
    read: Callable[[Path, int | None, int | None], Tensor]
    describe: Callable[[Path], Description] | None = None
    plan: Callable[[CoSettleAdapter, Settings], Settings] = _unchanged
    arrange: Callable[[Tensor, Geometry], tuple[Tensor, Geometry]] = _as_they_are
