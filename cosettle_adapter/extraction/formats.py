"""Formats of feature files: completing them from appended values, and reading them.

During an extraction, the values of every format are appended to a plain file after
:data:`RESERVED` bytes. Most formats are completed by a header in that space and perhaps a trailer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosettle_adapter.errors import CorruptFeatureFileError, did_you_mean
from cosettle_adapter.extraction.dino_tracker import save_tensor
from cosettle_adapter.extraction.record import RESERVED, RunRecord, read_sidecar, sidecar_path
from cosettle_adapter.extraction.settings import FormatError
from cosettle_adapter.imports import require
from cosettle_adapter.video import Geometry

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHUNK_BYTES = 16 << 20  # maximum size of a zarr chunk
# raised by safetensors, NumPy, zarr and torch for damaged files
_UNREADABLE = (
    SafetensorError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip

# features, and the metadata in the file (with geometry and timestamps), if any
Content = tuple[Tensor, Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of feature files."""

    name: str
    suffix: str
    dtypes: tuple[str, ...]
    finish: Callable[[Path, RunRecord], Path]  # completes the file in place, or writes another
    read: Callable[[Path, slice], Content]
    require: Callable[[], object] = lambda: None  # raises if the format's package is missing


def _finish_safetensors(path: Path, record: RunRecord) -> Path:
    frames, *_ = shape = record.shape
    end = frames * record.frame_bytes
    times = end + -end % 8  # aligned; the format allows no holes, hence the padding
    dtype = _SAFETENSORS[record.request["storage"]]
    header = {
        "__metadata__": {"description": json.dumps(record.description)},
        "features": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]},
        "padding": {"dtype": "U8", "shape": [times - end], "data_offsets": [end, times]},
        "timestamps": {
            "dtype": "F64",
            "shape": [frames],
            "data_offsets": [times, times + 8 * frames],
        },
    }
    if times == end:
        del header["padding"]
    with path.open("r+b") as file:
        file.write(
            struct.pack("<Q", RESERVED - 8) + json.dumps(header).encode().ljust(RESERVED - 8)
        )
        file.seek(RESERVED + end)
        file.write(bytes(times - end) + struct.pack(f"<{frames}d", *record.timestamps))
    return path


def _read_safetensors(path: Path, frames: slice) -> Content:
    """Map all features from disk, or copy a range."""
    with safe_open(path, framework="pt") as file:
        if frames == slice(None):
            features = file.get_tensor("features")
        else:
            features = file.get_slice("features")[frames]
        description = json.loads((file.metadata() or {})["description"])
        return features, description | {"timestamps": file.get_tensor("timestamps").tolist()}


def _finish_npy(path: Path, record: RunRecord) -> Path:
    """Write the header for ``np.load(path, mmap_mode="r")``; metadata is in the sidecar."""
    descr = np.dtype(record.request["storage"]).newbyteorder("<").str
    fields = {"descr": descr, "fortran_order": False, "shape": tuple(record.shape)}
    magic = np.lib.format.magic(1, 0)
    length = RESERVED - len(magic) - 2
    with path.open("r+b") as file:
        file.write(magic + struct.pack("<H", length) + repr(fields).encode().ljust(length - 1))
        file.write(b"\n")
    return path


def _read_npy(path: Path, frames: slice) -> Content:
    """Map features from disk; writing to them does not change the file."""
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)[frames]), None


def _finish_zarr(path: Path, record: RunRecord) -> Path:
    """Copy the values into a group of features and timestamps, in chunks of frames."""
    whole, dtype = path.with_suffix(".whole"), record.request["storage"]
    numbers = np.memmap(path, dtype=dtype, offset=RESERVED, shape=tuple(record.shape))
    group = _open_zarr(whole, "w")
    group.attrs.update({"description": record.description})
    chunk = min(len(numbers), max(1, _CHUNK_BYTES // record.frame_bytes))
    dimensions = ("time", "channel", "row", "column")  # what xarray calls them
    for name, values in (("features", numbers), ("timestamps", np.array(record.timestamps))):
        options: dict[str, Any] = {"shape": values.shape, "dtype": values.dtype, "fill_value": 0}
        options["chunks"] = (chunk, *values.shape[1:])
        # features hardly compress, and uncompressed bytes do not depend on a library's version
        names = dimensions[: values.ndim]
        if hasattr(group, "create_array"):
            array = group.create_array(name, compressors=None, dimension_names=names, **options)
        else:  # zarr 2, the last one for Python 3.10
            array = group.create_dataset(name, compressor=None, **options)
            array.attrs["_ARRAY_DIMENSIONS"] = list(names)
        if name == "features":
            array.attrs["coordinates"] = "timestamps"
        for start in range(0, len(values), chunk):
            array[start : start + chunk] = values[start : start + chunk]
    return whole


def _read_zarr(path: Path, frames: slice) -> Content:
    group = _open_zarr(path, "r")
    description = group.attrs["description"] | {"timestamps": group["timestamps"][:].tolist()}
    return torch.from_numpy(group["features"][frames]), description


def _finish_tracker(path: Path, record: RunRecord) -> Path:
    return save_tensor(path, path.with_suffix(".whole"), tuple(record.shape), offset=RESERVED)


def _read_tracker(path: Path, frames: slice) -> Content:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)[frames], None


def _require_zarr() -> Any:
    return require("zarr", extra="zarr", purpose="the zarr format")


def _open_zarr(path: Path, mode: str) -> Any:
    return _require_zarr().open_group(str(path), mode=mode)


_NUMPY, _ALL = ("float32", "float16"), tuple(_SAFETENSORS)  # NumPy has no bfloat16
FORMATS = {
    form.name: form
    for form in (
        Format("safetensors", ".safetensors", _ALL, _finish_safetensors, _read_safetensors),
        Format("zarr", ".zarr", _NUMPY, _finish_zarr, _read_zarr, _require_zarr),
        Format("npy-memmap", ".npy", _NUMPY, _finish_npy, _read_npy),
        Format("dino-tracker", ".pt", ("float32",), _finish_tracker, _read_tracker),
    )
}
_SUFFIXES = ", ".join(f"{form.suffix} ({form.name})" for form in FORMATS.values())


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """Features with their times, their geometry and a description of how they were made."""

    features: Tensor  # (T, C, h, w)
    timestamps: Tensor  # (T,) float64, seconds
    geometry: Geometry  # how patches map to pixels of the source's frames
    metadata: Mapping[str, Any]  # source, backbone, fingerprint, layers, settings and versions


def read_features(
    path: str | os.PathLike[str], *, start: int | None = None, stop: int | None = None
) -> FeatureFile:
    """Read a feature file of any format, or its frames from ``start`` to before ``stop``.

    Whole files are mapped from disk, except zarr, which is copied. Metadata comes from the sidecar
    ``PATH.json``; safetensors and zarr can be read without it.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFeatureFileError: truncated, or not a feature file.
        MissingExtraError: zarr is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    sidecar, frames = read_sidecar(path), slice(start, stop)
    form = format_of(path) if sidecar is None else FORMATS.get(sidecar.get("format", ""))
    if form is None:
        raise CorruptFeatureFileError(
            f"{path} is not a feature file: its suffix is none of {_SUFFIXES}"
        )
    try:
        features, description = form.read(path, frames)
        metadata = dict(sidecar or description or {})
        if not metadata:
            raise ValueError(f"its sidecar {sidecar_path(path).name} is missing")
        timestamps = torch.tensor(metadata.pop("timestamps"), dtype=torch.float64)
        geometry = Geometry.from_dict(metadata.pop("geometry"))
    except _UNREADABLE as error:
        raise CorruptFeatureFileError(
            f"{path} is truncated or not a file that `cosettle-adapter extract` wrote: {error}"
        ) from error
    return FeatureFile(features, timestamps[frames], geometry, metadata)


def format_of(path: Path) -> Format | None:
    """Return the format that a file's suffix tells, if any."""
    suffix = path.suffix.lower()
    return next((form for form in FORMATS.values() if form.suffix == suffix), None)


def choose_format(path: Path, name: str | None) -> Format:
    """Return the format of an output, by ``name`` or suffix, and check that it can be written."""
    by_suffix = format_of(path)
    form = by_suffix if name is None else FORMATS.get(name)
    if form is None and name is not None:
        close = did_you_mean(name, FORMATS)
        raise FormatError(f"unknown format {name!r}; expected one of {', '.join(FORMATS)}.{close}")
    if form is None:
        raise FormatError(
            f"the suffix of {path.name} is not that of a format: use one of {_SUFFIXES}, or give "
            "--format (format=)"
        )
    if by_suffix is not None and by_suffix is not form:
        raise FormatError(
            f"got format {form.name} for {path.name}, whose suffix is that of {by_suffix.name}: "
            f"use the suffix {form.suffix}, or another format"
        )
    form.require()
    return form


def storage_dtype(form: Format, requested: str | torch.dtype | None, own: torch.dtype) -> str:
    """Return the dtype to store: by default the features' own, or float32 if it is unsupported."""
    name, default = str(requested or own).removeprefix("torch."), form.dtypes[0]
    if name in form.dtypes:
        return name
    if requested is None:
        return default
    others = " or ".join(other.name for other in FORMATS.values() if name in other.dtypes)
    raise FormatError(
        f"{form.name} stores {' or '.join(form.dtypes)}, not {name}: give --storage {default} "
        f"(storage=torch.{default}){f'; {name} goes into {others}' if others else ''}"
    )
