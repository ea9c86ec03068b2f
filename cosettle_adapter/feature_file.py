"""Feature files: safetensors written frame by frame, without knowing their number beforehand.

A safetensors file begins with a header that holds every tensor's shape. Room for it is reserved,
the features are appended as they come, and the header is written last; so memory is constant and
any safetensors reader opens the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError
from cosettle_adapter.files import atomic_path
from cosettle_adapter.frames.geometry import Geometry

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8
_SPARE = 512  # for the digits of the frame count and offsets, unknown until the end


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """What :func:`read_features` returns.

    Attributes:
        features: ``(T, C, h, w)``.
        timestamps: ``(T,)`` float64, seconds.
        geometry: how cells map to pixels of the source's frames.
        metadata: model, fingerprint and the rest of what was written.
    """

    features: Tensor
    timestamps: Tensor
    geometry: Geometry
    metadata: Mapping[str, str]


class FeatureWriter:
    """Appends feature maps to an open file; :func:`write_features` makes one."""

    def __init__(self, file: BinaryIO, geometry: Geometry, metadata: Mapping[str, str]) -> None:
        self._file = file
        self._metadata = {**metadata, "geometry": json.dumps(geometry.to_dict())}
        self._timestamps: list[Tensor] = []
        self._shape: tuple[int, ...] | None = None
        self._dtype = torch.float32
        reserved = len(self._header(frames=0)) + _SPARE
        self._reserved = -(-reserved // _ALIGNMENT) * _ALIGNMENT
        file.write(b"\0" * (8 + self._reserved))

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return sum(len(timestamps) for timestamps in self._timestamps)

    def append(self, features: Tensor, timestamps: Tensor) -> None:
        """Append ``(N, C, h, w)`` features and their ``(N,)`` timestamps.

        Raises:
            ValueError: another shape or dtype than what was appended before.
        """
        shape = tuple(features.shape[1:])
        if self._shape is None:
            if features.dtype not in _DTYPES:
                raise ValueError(f"features are {features.dtype}, expected one of {list(_DTYPES)}")
            self._shape, self._dtype = shape, features.dtype
        if (shape, features.dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"got features {shape} {features.dtype} after {self._shape} {self._dtype}; "
                "one file holds one shape"
            )
        # A flat view of bytes: torch writes bfloat16, which NumPy does not know.
        flat = rearrange(features.detach().cpu().contiguous(), "n c h w -> (n c h w)")
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._timestamps.append(timestamps.to("cpu", torch.float64))

    def finish(self) -> None:
        """Write timestamps and the header."""
        size = self._feature_bytes()
        self._file.write(b"\0" * (-size % _ALIGNMENT))
        if self._timestamps:
            self._file.write(torch.cat(self._timestamps).numpy().data)
        header = self._header(frames=self.frames).ljust(self._reserved)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._reserved) + header)

    def _feature_bytes(self) -> int:
        cells = 1
        for side in self._shape or (0,):
            cells *= side
        return self.frames * cells * self._dtype.itemsize

    def _header(self, *, frames: int) -> bytes:
        end = self._feature_bytes() if frames else 0
        padded = end + -end % _ALIGNMENT
        tensors: dict[str, object] = {
            "__metadata__": self._metadata,
            "features": {
                "dtype": _DTYPES[self._dtype],
                "shape": [frames, *(self._shape or (0, 0, 0))],
                "data_offsets": [0, end],
            },
        }
        if padded > end:  # the format allows no holes
            tensors["padding"] = {
                "dtype": "U8",
                "shape": [padded - end],
                "data_offsets": [end, padded],
            }
        tensors["timestamps"] = {
            "dtype": "F64",
            "shape": [frames],
            "data_offsets": [padded, padded + 8 * frames],
        }
        return json.dumps(tensors).encode()


@contextlib.contextmanager
def write_features(
    path: str | Path, geometry: Geometry, metadata: Mapping[str, str]
) -> Iterator[FeatureWriter]:
    """Write a feature file that appears under ``path`` when the block succeeds, or not at all.

    Args:
        path: the file, conventionally ``.safetensors``.
        geometry: how cells map to pixels.
        metadata: strings to keep with the features.
    """
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        writer = FeatureWriter(file, geometry, metadata)
        yield writer
        writer.finish()


def read_features(path: str | Path) -> FeatureFile:
    """Read a feature file; tensors are mapped from disk, not copied.

    Raises:
        CorruptWeightsError: truncated, or not a feature file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return FeatureFile(
                features=file.get_tensor("features"),
                timestamps=file.get_tensor("timestamps"),
                geometry=Geometry.from_dict(json.loads(metadata["geometry"])),
                metadata=metadata,
            )
    except (SafetensorError, KeyError) as error:
        raise CorruptWeightsError(
            f"{path} is truncated or not a file that `cosettle-adapter extract` wrote: {error}"
        ) from error
