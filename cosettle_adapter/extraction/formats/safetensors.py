"""Safetensors files, written frame by frame without knowing their number beforehand.

A safetensors file begins with a header that holds every tensor's shape. Room for it is reserved,
the features are appended as they come, and the header is written last; so memory is constant and
any safetensors reader opens the result.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cosettle_adapter.extraction.formats.base import Description, Format, Layout
from cosettle_adapter.extraction.formats.flat import FlatStore, as_bytes
from cosettle_adapter.video.geometry import Geometry

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8
_SPARE = 512  # for the digits of the frame count and offsets, unknown until the end


class SafetensorsStore(FlatStore):
    """A safetensors file under construction."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Open the file, or make it."""
        length = len(_fields(layout, frames=0)) + _SPARE
        self._length = length + -length % _ALIGNMENT
        super().__init__(path, layout, reserved=8 + self._length)

    def header(self, frames: int) -> bytes:
        """Return the header, filled up with blanks."""
        fields = _fields(self.layout, frames).ljust(self._length)
        return struct.pack("<Q", self._length) + fields

    def ending(self, frames: int, timestamps: Tensor) -> bytes:
        """Return the timestamps, aligned."""
        padding = -frames * self.layout.frame_bytes % _ALIGNMENT
        return bytes(padding) + bytes(as_bytes(timestamps))


def _fields(layout: Layout, frames: int) -> bytes:
    end = frames * layout.frame_bytes
    padded = end + -end % _ALIGNMENT
    tensors: dict[str, object] = {
        "__metadata__": {
            "description": json.dumps(layout.metadata),
            "geometry": json.dumps(layout.geometry.to_dict()),
        },
        "features": {
            "dtype": _DTYPES[layout.dtype],
            "shape": [frames, *layout.shape],
            "data_offsets": [0, end],
        },
    }
    if padded > end:  # the format allows no holes
        tensors["padding"] = {"dtype": "U8", "shape": [padded - end], "data_offsets": [end, padded]}
    tensors["timestamps"] = {
        "dtype": "F64",
        "shape": [frames],
        "data_offsets": [padded, padded + 8 * frames],
    }
    return json.dumps(tensors).encode()


def read(path: Path, start: int | None, stop: int | None) -> Tensor:
    """Return features, mapped from disk; a range of them is copied."""
    with safe_open(path, framework="pt") as file:
        if start is None and stop is None:
            features: Tensor = file.get_tensor("features")
        else:
            features = file.get_slice("features")[slice(start, stop)]
        return features


def describe(path: Path) -> Description:
    """Return what the header and the timestamps say."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        return Description(
            timestamps=file.get_tensor("timestamps"),
            geometry=Geometry.from_dict(json.loads(metadata["geometry"])),
            metadata=json.loads(metadata["description"]),
        )


FORMAT = Format(
    name="safetensors",
    suffix=".safetensors",
    summary="one file that any safetensors reader maps from disk",
    dtypes=tuple(_DTYPES),
    open=SafetensorsStore,
    read=read,
    describe=describe,
)
