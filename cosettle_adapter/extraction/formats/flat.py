"""One file that holds a header of reserved length and then, frame by frame, the features."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.extraction.formats.base import Layout


class FlatStore:
    """A store of that kind; formats say what header and what end make it whole."""

    def __init__(self, path: Path, layout: Layout, *, reserved: int) -> None:
        """Open the file, or make it.

        Args:
            path: the file.
            layout: what its frames are.
            reserved: bytes of the header.
        """
        self.layout = layout
        self._reserved = reserved
        self._frames = 0
        self._file: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() < reserved:
            self.keep(0)

    def append(self, features: Tensor) -> None:
        """Append ``(N, C, h, w)`` features."""
        self._file.write(as_bytes(features))
        self._frames += len(features)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    def read(self, start: int, stop: int) -> Tensor:
        """Return frames that an earlier process appended.

        Raises:
            ValueError: they are not all there.
        """
        self._file.seek(self._reserved + start * self.layout.frame_bytes)
        content = bytearray((stop - start) * self.layout.frame_bytes)
        if self._file.readinto(content) < len(content):  # type: ignore[attr-defined]
            raise ValueError(f"frames {start} to {stop} are not all there")
        _, height, width = self.layout.shape
        flat = torch.frombuffer(content, dtype=self.layout.dtype)
        return rearrange(flat, "(n c h w) -> n c h w", n=stop - start, h=height, w=width)

    def keep(self, frames: int) -> None:
        """Forget all but the first ``frames``."""
        self._file.truncate(self._reserved + frames * self.layout.frame_bytes)
        self._file.seek(0, os.SEEK_END)
        self._frames = frames

    def finish(self, timestamps: Tensor) -> None:
        """Write what comes behind the features, and the header."""
        self._file.write(self.ending(self._frames, timestamps))
        self._file.seek(0)
        header = self.header(self._frames)
        if len(header) > self._reserved:
            raise ValueError(f"the header has {len(header)} bytes, {self._reserved} were reserved")
        self._file.write(header)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def header(self, frames: int) -> bytes:
        """Return the header of a file of so many frames; nothing where ``finish`` writes it."""
        del frames
        return b""

    def ending(self, frames: int, timestamps: Tensor) -> bytes:
        """Return what follows the features."""
        del frames, timestamps
        return b""


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor of any dtype, also those that NumPy does not know."""
    flat = rearrange(tensor.detach().contiguous(), "... -> (...)")
    return flat.view(torch.uint8).numpy().data
