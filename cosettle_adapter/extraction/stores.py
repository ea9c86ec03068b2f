"""The formats of feature files: append batches, read them back, become a whole file."""

from __future__ import annotations

import abc
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.extraction.record import RunRecord
from cosettle_adapter.extraction.settings import ExtractSettings
from cosettle_adapter.imports import require
from cosettle_adapter.video import Geometry

Description = tuple[Tensor, Geometry, Mapping[str, Any]]


class Store(abc.ABC):
    """A format; an instance is one file (or folder) of it under construction.

    One thread uses a store. The process may be killed at any moment, also within :meth:`append`;
    :meth:`keep` brings what is left back to whole batches. The bytes of the finished store depend
    on the record and the frames alone, never on interruptions.

    Attributes:
        name: what ``--format`` calls it.
        suffix: of its files; tells the format of ``-o clip.zarr`` too.
        dtypes: what it can store, the default first unless the adapter's own is among them.
        record: the run; its shape, dtype, batch size, geometry and metadata are used.
        frames: how many were appended or kept.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def __init__(self, path: Path, record: RunRecord) -> None:
        """Open the file at ``path`` or create it."""
        self.record = record
        self.frames = 0

    @abc.abstractmethod
    def append(self, features: Tensor) -> None:
        """Append ``(N, C, h, w)`` features, contiguous, on the CPU, of the record's dtype.

        They are handed to the system, so that they outlive this process.
        """

    @abc.abstractmethod
    def read_back(self, start: int, stop: int) -> Tensor:
        """Return ``(N, C, h, w)``: frames ``start`` to ``stop`` of an earlier process.

        Raises:
            ValueError, OSError: some are missing.
        """

    @abc.abstractmethod
    def keep(self, frames: int) -> None:
        """Drop all but the first ``frames``; appending continues after them."""

    @abc.abstractmethod
    def finish(self, timestamps: Tensor) -> None:
        """Make the file whole; ``timestamps`` are ``(T,)`` float64, of all frames."""

    def close(self) -> None:  # noqa: B027
        """Release what is open; may be called twice, and after errors."""

    @staticmethod
    @abc.abstractmethod
    def read(path: Path, start: int | None, stop: int | None) -> Tensor:
        """Return frames ``start`` to ``stop`` (``None`` for all) of a finished file."""

    @staticmethod
    def describe(path: Path) -> Description | None:
        """Return timestamps, geometry and metadata, where the file itself holds them."""
        del path
        return None

    @classmethod
    def plan(cls, adapter: CoSettleAdapter, settings: ExtractSettings) -> ExtractSettings:
        """Fill in, or refuse, settings that the format dictates."""
        del adapter
        return settings

    @classmethod
    def arrange(
        cls, features: Tensor, geometry: Geometry, *, first: int
    ) -> tuple[Tensor, Geometry]:
        """Change ``(N, C, h, w)`` features, from frame ``first`` on, as the format wants them."""
        del first
        return features, geometry


class FlatStore(Store):
    """One file: a header of reserved length, then the features, frame by frame."""

    reserved: int  # bytes of the header

    def __init__(self, path: Path, record: RunRecord) -> None:
        """Open the file or create it."""
        super().__init__(path, record)
        self._file: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() < self.reserved:
            self.keep(0)

    def append(self, features: Tensor) -> None:
        """Append features."""
        self._file.write(as_bytes(features))
        self._file.flush()
        self.frames += len(features)

    def read_back(self, start: int, stop: int) -> Tensor:
        """Read frames of an earlier process."""
        self._file.seek(self.reserved + start * self.record.frame_bytes)
        content = bytearray((stop - start) * self.record.frame_bytes)
        if self._file.readinto(content) < len(content):  # type: ignore[attr-defined]
            raise ValueError(f"frames {start} to {stop} are not all there")
        _, height, width = self.record.shape
        flat = torch.frombuffer(content, dtype=self.record.dtype)
        return rearrange(flat, "(n c h w) -> n c h w", n=stop - start, h=height, w=width)

    def keep(self, frames: int) -> None:
        """Drop all but the first frames."""
        self._file.truncate(self.reserved + frames * self.record.frame_bytes)
        self._file.seek(0, os.SEEK_END)
        self.frames = frames

    def finish(self, timestamps: Tensor) -> None:
        """Write what follows the features, and the header."""
        self._file.write(self.ending(timestamps))
        self._file.seek(0)
        self._file.write(self.header())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def header(self) -> bytes:
        """Return the header, ``reserved`` bytes."""
        raise NotImplementedError

    def ending(self, timestamps: Tensor) -> bytes:
        """Return what follows the features."""
        del timestamps
        return b""


class SafetensorsStore(FlatStore):
    """One file that any safetensors reader maps from disk.

    Its header holds the shapes of all tensors, so it is written last, into the space reserved for
    it; memory is constant although the number of frames is unknown until the end.
    """

    name = "safetensors"
    suffix = ".safetensors"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    _names: ClassVar = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    _alignment = 8
    _spare = 512  # for the digits of frame counts and offsets

    def __init__(self, path: Path, record: RunRecord) -> None:
        """Open the file or create it."""
        length = len(self._fields(record, frames=0)) + self._spare
        self.reserved = 8 + length + -length % self._alignment
        super().__init__(path, record)

    def header(self) -> bytes:
        """Return the header, filled up with blanks."""
        length = self.reserved - 8
        return struct.pack("<Q", length) + self._fields(self.record, self.frames).ljust(length)

    def ending(self, timestamps: Tensor) -> bytes:
        """Return the timestamps, aligned."""
        padding = -self.frames * self.record.frame_bytes % self._alignment
        return bytes(padding) + bytes(as_bytes(timestamps))

    @classmethod
    def _fields(cls, record: RunRecord, frames: int) -> bytes:
        end = frames * record.frame_bytes
        padded = end + -end % cls._alignment
        tensors: dict[str, object] = {
            "__metadata__": {
                "description": json.dumps(record.asked),
                "geometry": json.dumps(record.geometry.to_dict()),
            },
            "features": {
                "dtype": cls._names[record.dtype],
                "shape": [frames, *record.shape],
                "data_offsets": [0, end],
            },
        }
        if padded > end:  # the format allows no holes
            tensors["padding"] = {
                "dtype": "U8", "shape": [padded - end], "data_offsets": [end, padded],
            }  # fmt: skip
        tensors["timestamps"] = {
            "dtype": "F64", "shape": [frames], "data_offsets": [padded, padded + 8 * frames],
        }  # fmt: skip
        return json.dumps(tensors).encode()

    @staticmethod
    def read(path: Path, start: int | None, stop: int | None) -> Tensor:
        """Return features, mapped from disk; a range of them is copied."""
        with safe_open(path, framework="pt") as file:
            if start is None and stop is None:
                features: Tensor = file.get_tensor("features")
            else:
                features = file.get_slice("features")[slice(start, stop)]
            return features

    @staticmethod
    def describe(path: Path) -> Description:
        """Return what the header and the timestamps say."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            geometry = Geometry.from_dict(json.loads(metadata["geometry"]))
            return file.get_tensor("timestamps"), geometry, json.loads(metadata["description"])


class NpyStore(FlatStore):
    """A plain array for ``np.load(path, mmap_mode="r")``; timestamps are in the sidecar alone."""

    name = "npy-memmap"
    suffix = ".npy"
    dtypes = (torch.float32, torch.float16)  # NumPy has no bfloat16
    _names: ClassVar = {torch.float32: "<f4", torch.float16: "<f2"}
    _magic = b"\x93NUMPY\x01\x00"
    reserved = 192  # a multiple of 64, as the format asks for; any shape fits

    def header(self) -> bytes:
        """Return the header, filled up with blanks."""
        shape = (self.frames, *self.record.shape)
        fields = {
            "descr": self._names[self.record.dtype], "fortran_order": False, "shape": shape,
        }  # fmt: skip
        length = self.reserved - len(self._magic) - 2
        text = repr(fields).encode("latin1").ljust(length - 1) + b"\n"
        return self._magic + length.to_bytes(2, "little") + text

    @staticmethod
    def read(path: Path, start: int | None, stop: int | None) -> Tensor:
        """Return features mapped from disk; writing to them changes no file."""
        numpy = require("numpy", extra="video", purpose="reading .npy files")
        mapped = numpy.load(path, mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(mapped[start:stop])


class ZarrStore(Store):
    """A zarr group (extra ``zarr``): an array of features and one of timestamps, in small chunks.

    A chunk holds whole frames, as many as divide a batch and fit in 16 MB; so every chunk is
    written once.
    """

    name = "zarr"
    suffix = ".zarr"
    dtypes = (torch.float32, torch.float16)  # zarr has no bfloat16
    _chunk_bytes = 16 << 20

    def __init__(self, path: Path, record: RunRecord) -> None:
        """Open the group or create it."""
        super().__init__(path, record)
        self._group = self._open(path, "a")
        for leftover in path.rglob("*.partial"):  # what zarr calls a file until it is whole
            leftover.unlink()
        if "features" not in self._group:
            self._group.attrs.update(
                {"description": dict(record.asked), "geometry": record.geometry.to_dict()}
            )
            batch = record.asked["batch_size"]
            fitting = max(1, self._chunk_bytes // record.frame_bytes)
            chunk = max(n for n in range(1, min(batch, fitting) + 1) if batch % n == 0)
            dtype = record.asked["storage"]
            self._create("features", (0, *record.shape), (chunk, *record.shape), dtype)
        self._features = self._group["features"]
        self.frames = self._features.shape[0]

    def append(self, features: Tensor) -> None:
        """Append features."""
        start = self.frames
        self.keep(start + len(features))
        self._features[start:] = features.numpy()

    def read_back(self, start: int, stop: int) -> Tensor:
        """Read frames of an earlier process."""
        if stop > self._features.shape[0]:
            raise ValueError(f"frames {start} to {stop} are not all there")
        return torch.from_numpy(self._features[start:stop])

    def keep(self, frames: int) -> None:
        """Change the number of frames."""
        self._features.resize((frames, *self.record.shape))
        self.frames = frames

    def finish(self, timestamps: Tensor) -> None:
        """Write the timestamps."""
        length = len(timestamps)
        if "timestamps" not in self._group:  # the process may be killed after this line
            self._create("timestamps", (length,), (length,), "float64")
        self._group["timestamps"][:] = timestamps.numpy()

    @classmethod
    def read(cls, path: Path, start: int | None, stop: int | None) -> Tensor:
        """Return features, read into memory."""
        return torch.from_numpy(cls._open(path, "r")["features"][start:stop])

    @classmethod
    def describe(cls, path: Path) -> Description:
        """Return what the group's attributes and timestamps say."""
        group = cls._open(path, "r")
        geometry = Geometry.from_dict(group.attrs["geometry"])
        return torch.from_numpy(group["timestamps"][:]), geometry, group.attrs["description"]

    @staticmethod
    def _open(path: Path, mode: str) -> Any:
        zarr = require("zarr", extra="zarr", purpose="the zarr format")
        return zarr.open_group(str(path), mode=mode)

    def _create(
        self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
    ) -> None:
        # features hardly compress, and uncompressed bytes do not depend on a library's version
        options: dict[str, Any] = {
            "shape": shape, "chunks": chunks, "dtype": dtype, "fill_value": 0,
        }  # fmt: skip
        if hasattr(self._group, "create_array"):
            self._group.create_array(name, compressors=None, **options)
        else:  # zarr 2, the last one for Python 3.10
            self._group.create_dataset(name, compressor=None, **options)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor of any dtype, also of those that NumPy lacks."""
    flat = rearrange(tensor.detach().contiguous(), "... -> (...)")
    return flat.view(torch.uint8).numpy().data
