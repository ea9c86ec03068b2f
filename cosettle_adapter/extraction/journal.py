"""A run's notes of what it has written, one JSON line at a time, by which another goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosettle_adapter.extraction.formats.base import Layout
from cosettle_adapter.video.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class Entry:
    """A batch that was written.

    Attributes:
        checksum: CRC-32 of its bytes.
        timestamps: seconds, one a frame.
    """

    checksum: int
    timestamps: list[float]


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a journal says.

    Attributes:
        layout: of the features.
        entries: the batches, in order.
    """

    layout: Layout
    entries: list[Entry]


class Journal:
    """The notes of a run, appended to; a line that a kill cut off does not count."""

    def __init__(self, path: Path) -> None:
        """Name the file; it is made by :meth:`begin`."""
        self._path = path

    def read(self) -> Notes | None:
        """Return what was noted; ``None`` if nothing was, or nothing that can be understood."""
        lines: list[Mapping[str, Any]] = []
        try:
            for line in self._path.read_text().splitlines():
                lines.append(json.loads(line))
        except FileNotFoundError:
            return None
        except ValueError:
            pass  # the kill came while this line was written
        try:
            return Notes(_layout(lines[0]), [Entry(**line) for line in lines[1:]])
        except (AttributeError, IndexError, KeyError, TypeError):
            return None

    def begin(self, notes: Notes) -> None:
        """Start anew with these notes."""
        lines = [_header(notes.layout), *(dataclasses.asdict(entry) for entry in notes.entries)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        replacement = self._path.with_suffix(".new")
        replacement.write_text(text)
        replacement.replace(self._path)

    def append(self, entry: Entry) -> None:
        """Note one more batch."""
        with self._path.open("a") as file:
            file.write(f"{json.dumps(dataclasses.asdict(entry))}\n")


def _header(layout: Layout) -> dict[str, Any]:
    return {
        "shape": layout.shape,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "batch": layout.batch,
        "geometry": layout.geometry.to_dict(),
        "metadata": layout.metadata,
    }


def _layout(header: Mapping[str, Any]) -> Layout:
    channels, height, width = header["shape"]
    return Layout(
        shape=(channels, height, width),
        dtype=getattr(torch, header["dtype"]),
        batch=header["batch"],
        geometry=Geometry.from_dict(header["geometry"]),
        metadata=header["metadata"],
    )
