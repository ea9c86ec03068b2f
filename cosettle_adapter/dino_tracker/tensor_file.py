"""A tensor in PyTorch's own file format, written a piece at a time.

``torch.save`` wants the whole tensor in memory. Its file is an uncompressed ZIP archive of the
numbers and a pickle that says what they are, so the numbers can be appended as they come, behind
room for the header of the archive, and the rest be written when their count is known.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.files import atomic_path

# bytes before the numbers: two alignments of torch.save, so that a reader can map them
HEADER = 128

_ARCHIVE = "archive"
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20
_PADDING_FIELD = 0x4246  # torch.save's own mark, "FB"; readers skip it
_PIECE = 1 << 20


class TensorWriter:
    """Takes slices along the first axis; made by :func:`write_tensor`."""

    def __init__(self, file: BinaryIO, item: tuple[int, ...]) -> None:
        self._file = file
        self._item = item
        self._count = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what was written so far."""
        return (self._count, *self._item)

    def append(self, items: Tensor) -> None:
        """Append ``(N, ...)`` float32 items.

        Raises:
            ValueError: another shape or dtype.
        """
        if tuple(items.shape[1:]) != self._item or items.dtype != torch.float32:
            raise ValueError(
                f"expected float32 (N, {', '.join(map(str, self._item))}), "
                f"got {items.dtype} {tuple(items.shape)}"
            )
        flat = rearrange(items.detach().cpu().contiguous(), "n ... -> (n ...)")
        self._file.write(flat.numpy().data)
        self._count += len(items)


@contextlib.contextmanager
def write_tensor(path: Path, item: tuple[int, ...], *, location: str) -> Iterator[TensorWriter]:
    """Write a file for ``torch.load``; it appears when the block succeeds, or not at all.

    Args:
        path: the file.
        item: shape of the tensor without its first axis.
        location: as in :func:`finish_tensor`.

    Yields:
        A :class:`TensorWriter`; its tensor is as long as what is appended to it.
    """
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        file.write(b"\0" * HEADER)
        writer = TensorWriter(file, item)
        yield writer
        finish_tensor(file, writer.shape, location=location)


def finish_tensor(file: BinaryIO, shape: tuple[int, ...], *, location: str) -> None:
    """Make a file for ``torch.load`` of one that holds a tensor's numbers.

    Args:
        file: open for reading and writing; float32 numbers from byte :data:`HEADER` on. What
            lies behind them is cut off.
        shape: shape of the tensor.
        location: the device the tensor is loaded to unless ``map_location`` says otherwise,
            ``"cpu"`` or ``"cuda:0"``: all that tells a tensor saved on a GPU from any other.
    """
    numbers = _numbers_entry()
    numbers.file_size = numbers.compress_size = 4 * math.prod(shape)
    file.truncate(HEADER + numbers.file_size)
    numbers.header_offset, numbers.CRC = 0, _checksum(file)
    file.seek(0)
    # more than 4 GiB may have come, which a header without ZIP64 could not say
    file.write(numbers.FileHeader(zip64=True))
    file.seek(HEADER + numbers.file_size)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.infolist().append(numbers)
        for name, content in (
            ("data.pkl", _description(shape, location)),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
        ):
            # not by name alone, which would put the time of day into the file
            archive.writestr(zipfile.ZipInfo(f"{_ARCHIVE}/{name}"), content)


def _numbers_entry() -> zipfile.ZipInfo:
    """The first entry of the archive, its header as long as the room that was left for it."""
    entry = zipfile.ZipInfo(f"{_ARCHIVE}/data/0")
    padding = HEADER - _LOCAL_HEADER - len(entry.filename) - _ZIP64_FIELD - 4
    entry.extra = struct.pack("<HH", _PADDING_FIELD, padding) + b"Z" * padding
    return entry


def _checksum(file: BinaryIO) -> int:
    file.seek(HEADER)
    checksum = 0
    while piece := file.read(_PIECE):
        checksum = zlib.crc32(piece, checksum)
    return checksum


class _Storage:
    """Stands for the numbers, which the pickle only names."""


class _Described:
    """Pickles as a contiguous tensor of one shape over :class:`_Storage` would."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self._shape, device="meta").stride()
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Storage(), 0, self._shape, stride, False, OrderedDict())


def _description(shape: tuple[int, ...], location: str) -> bytes:
    """``data.pkl`` as ``torch.save`` writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if isinstance(item, _Storage):
                return ("storage", torch.FloatStorage, "0", location, math.prod(shape))
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(_Described(shape))
    return stream.getvalue()
