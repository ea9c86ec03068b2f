"""The formats features are written in: a table of rows, one module a format."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cosettle_adapter.errors import did_you_mean
from cosettle_adapter.extraction.errors import FormatError
from cosettle_adapter.extraction.formats import dino_tracker, memmap, safetensors, zarr
from cosettle_adapter.extraction.formats.base import Description, Format, Layout, Store

FORMATS: dict[str, Format] = {
    row.name: row for row in (safetensors.FORMAT, zarr.FORMAT, memmap.FORMAT, dino_tracker.FORMAT)
}
DEFAULT_FORMAT = safetensors.FORMAT.name

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "Description",
    "Format",
    "Layout",
    "Store",
    "choose_format",
    "find_format",
    "format_of",
    "storage_dtype",
]


def find_format(name: str) -> Format:
    """Return the row called ``name``.

    Raises:
        FormatError: there is none.
    """
    if name not in FORMATS:
        raise FormatError(
            f"unknown format {name!r}; there are {', '.join(FORMATS)}.{did_you_mean(name, FORMATS)}"
        )
    return FORMATS[name]


def format_of(path: str | os.PathLike[str]) -> Format | None:
    """Return the format that a file's suffix tells, if any."""
    suffix = Path(path).suffix.lower()
    return next((row for row in FORMATS.values() if row.suffix == suffix), None)


def choose_format(path: Path, name: str | None) -> Format:
    """Return the format of a file.

    Raises:
        FormatError: none is named by ``name`` or the file's suffix, or they disagree.
    """
    told = format_of(path)
    if name is None:
        if told is None:
            known = ", ".join(f"{row.suffix} ({row.name})" for row in FORMATS.values())
            raise FormatError(
                f"{path.name} does not tell its format by its suffix: end it in one of {known}, "
                "or give --format (format=)"
            )
        return told
    row = find_format(name)
    if told is not None and told is not row:
        raise FormatError(
            f"{path.name} is to be {row.name}, but its suffix tells {told.name}: "
            f"end it in {row.suffix}"
        )
    return row


def storage_dtype(row: Format, wanted: torch.dtype | None, computed: torch.dtype) -> torch.dtype:
    """Return the dtype features are stored in.

    Args:
        row: the format.
        wanted: what was asked for, if anything.
        computed: the adapter's own, in which they are stored otherwise.

    Raises:
        FormatError: the format cannot store it.
    """
    dtype = wanted or computed
    if dtype in row.dtypes:
        return dtype
    able = [other.name for other in FORMATS.values() if dtype in other.dtypes]
    how = f"; {_told(dtype)} goes into {' or '.join(able)}" if able else ""
    raise FormatError(
        f"{row.name} stores {' or '.join(map(_told, row.dtypes))}, not {_told(dtype)}: "
        f"give --storage {_told(row.dtypes[0])} (storage=torch.{_told(row.dtypes[0])}){how}"
    )


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
