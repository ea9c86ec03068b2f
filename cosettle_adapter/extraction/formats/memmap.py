"""Plain ``.npy`` files that ``np.load(path, mmap_mode="r")`` maps, of a length unknown at first."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cosettle_adapter.extraction.formats.base import Format, Layout
from cosettle_adapter.extraction.formats.flat import FlatStore
from cosettle_adapter.extras import require

_DTYPES = {torch.float32: "<f4", torch.float16: "<f2"}  # NumPy knows no bfloat16
_HEADER = 192  # bytes, a multiple of 64 as the format asks for; any shape fits
_MAGIC = b"\x93NUMPY\x01\x00"


class NpyStore(FlatStore):
    """An ``.npy`` file under construction; timestamps are in its sidecar alone."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Open the file, or make it."""
        super().__init__(path, layout, reserved=_HEADER)

    def header(self, frames: int) -> bytes:
        """Return the header, filled up with blanks."""
        fields = {
            "descr": _DTYPES[self.layout.dtype],
            "fortran_order": False,
            "shape": (frames, *self.layout.shape),
        }
        length = _HEADER - len(_MAGIC) - 2
        text = repr(fields).encode("latin1").ljust(length - 1) + b"\n"
        return _MAGIC + length.to_bytes(2, "little") + text


def read(path: Path, start: int | None, stop: int | None) -> Tensor:
    """Return features mapped from disk; writing to them changes no file."""
    numpy = require("numpy", extra="video", purpose="reading .npy files")
    mapped = numpy.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(mapped[start:stop])


FORMAT = Format(
    name="npy-memmap",
    suffix=".npy",
    summary='a plain array for np.load(path, mmap_mode="r")',
    dtypes=tuple(_DTYPES),
    open=NpyStore,
    read=read,
)
