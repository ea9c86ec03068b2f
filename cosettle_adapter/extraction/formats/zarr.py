"""Zarr groups (extra ``zarr``): an array of features and one of timestamps, in small chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_adapter.extraction.formats.base import Description, Format, Layout
from cosettle_adapter.extras import require
from cosettle_adapter.video.geometry import Geometry

_DTYPES = {torch.float32: "float32", torch.float16: "float16"}  # zarr knows no bfloat16
_CHUNK_BYTES = 16 << 20
_UNFINISHED = "*.partial"  # what zarr calls a file until it is whole


class ZarrStore:
    """A zarr group under construction.

    A chunk holds whole frames, as many as divide a batch and fit in 16 MB; so every chunk is
    written once, whichever way batches come.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        """Open the group, or make it."""
        self._layout = layout
        self._group = _open(path, "a")
        for leftover in path.rglob(_UNFINISHED):
            leftover.unlink()
        if "features" not in self._group:
            self._group.attrs.update(
                {"description": dict(layout.metadata), "geometry": layout.geometry.to_dict()}
            )
            _create(
                self._group,
                "features",
                shape=(0, *layout.shape),
                chunks=(_frames_a_chunk(layout), *layout.shape),
                dtype=_DTYPES[layout.dtype],
            )
        self._features = self._group["features"]
        self._frames = self._features.shape[0]

    def append(self, features: Tensor) -> None:
        """Append ``(N, C, h, w)`` features."""
        start, self._frames = self._frames, self._frames + len(features)
        self._features.resize((self._frames, *self._layout.shape))
        self._features[start:] = features.numpy()

    def flush(self) -> None:
        """Nothing is held back."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return frames that an earlier process appended.

        Raises:
            ValueError: they are not all there.
        """
        if stop > self._features.shape[0]:
            raise ValueError(f"frames {start} to {stop} are not all there")
        return torch.from_numpy(self._features[start:stop])

    def keep(self, frames: int) -> None:
        """Forget all but the first ``frames``."""
        self._features.resize((frames, *self._layout.shape))
        self._frames = frames

    def finish(self, timestamps: Tensor) -> None:
        """Write the timestamps."""
        length = len(timestamps)
        if "timestamps" not in self._group:  # a kill may come between this and the end
            _create(self._group, "timestamps", shape=(length,), chunks=(length,), dtype="float64")
        self._group["timestamps"][:] = timestamps.numpy()

    def close(self) -> None:
        """Nothing is held open."""


def read(path: Path, start: int | None, stop: int | None) -> Tensor:
    """Return features, read into memory."""
    return torch.from_numpy(_open(path, "r")["features"][start:stop])


def describe(path: Path) -> Description:
    """Return what the group's attributes and timestamps say."""
    group = _open(path, "r")
    return Description(
        timestamps=torch.from_numpy(group["timestamps"][:]),
        geometry=Geometry.from_dict(group.attrs["geometry"]),
        metadata=group.attrs["description"],
    )


def _frames_a_chunk(layout: Layout) -> int:
    fitting = max(1, _CHUNK_BYTES // layout.frame_bytes)
    return max(d for d in range(1, layout.batch + 1) if layout.batch % d == 0 and d <= fitting)


def _open(path: Path, mode: str) -> Any:
    zarr = require("zarr", extra="zarr", purpose="the zarr format")
    return zarr.open_group(str(path), mode=mode)


def _create(group: Any, name: str, **layout: Any) -> None:
    # features hardly compress, and without compression bytes do not depend on a library's version
    if hasattr(group, "create_array"):
        group.create_array(name, compressors=None, fill_value=0, **layout)
    else:  # zarr 2, the last one for Python 3.10
        group.create_dataset(name, compressor=None, fill_value=0, **layout)


FORMAT = Format(
    name="zarr",
    suffix=".zarr",
    summary="a folder of chunks for zarr, xarray and dask",
    dtypes=tuple(_DTYPES),
    open=ZarrStore,
    read=read,
    describe=describe,
)
