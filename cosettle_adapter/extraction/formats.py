"""Formats of feature files: completing them from appended values, and reading them.

During an extraction, the values of every format are appended to a plain file after
:data:`RESERVED` bytes. Most formats are completed by a header in that space and perhaps a trailer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosettle_adapter.errors import CorruptFeatureFileError, did_you_mean
from cosettle_adapter.extraction.dino_tracker import save_tensor
from cosettle_adapter.extraction.record import (
    ARRAYS,
    RESERVED,
    RunRecord,
    read_sidecar,
    sidecar_path,
)
from cosettle_adapter.extraction.settings import TOKENS, FormatError
from cosettle_adapter.imports import require
from cosettle_adapter.video import Geometry

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHUNK_BYTES = 16 << 20  # maximum size of a zarr chunk
# raised by safetensors, NumPy, zarr and torch for damaged files
_UNREADABLE = (
    SafetensorError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip

# arrays by name, and the metadata in the file (with geometry and timestamps), if any
Content = tuple[dict[str, Tensor], Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of feature files."""

    name: str
    suffix: str
    dtypes: tuple[str, ...]
    finish: Callable[[Path, RunRecord], Path]  # completes the file in place, or writes another
    read: Callable[[Path, slice], Content]
    require: Callable[[], object] = lambda: None  # raises if the format's package is missing
    tokens: tuple[str, ...] = TOKENS  # kinds that it can hold
    several: bool = False  # whether it can hold more than one kind


def _finish_safetensors(path: Path, record: RunRecord) -> Path:
    """Write the header, and append the other arrays and the timestamps."""
    dtype, frames, end = _SAFETENSORS[record.request["storage"]], len(record.timestamps), 0
    header: dict[str, Any] = {"__metadata__": {"description": json.dumps(record.description)}}
    for name, shape in record.shapes.items():
        start, end = end, end + frames * record.frame_bytes(name)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    times = end + -end % 8  # aligned; the format allows no holes, hence the padding
    if times > end:
        header["padding"] = {"dtype": "U8", "shape": [times - end], "data_offsets": [end, times]}
    offsets = [times, times + 8 * frames]
    header["timestamps"] = {"dtype": "F64", "shape": [frames], "data_offsets": offsets}
    with path.open("r+b") as file:
        file.write(
            struct.pack("<Q", RESERVED - 8) + json.dumps(header).encode().ljust(RESERVED - 8)
        )
        file.seek(0, os.SEEK_END)
        for name in [*record.shapes][1:]:
            with record.values(name).open("rb") as values:
                values.seek(RESERVED)
                shutil.copyfileobj(values, file)
        file.write(bytes(times - end) + struct.pack(f"<{frames}d", *record.timestamps))
    return path


def _read_safetensors(path: Path, frames: slice) -> Content:
    """Map all values from disk, or copy a range."""
    whole = frames == slice(None)
    with safe_open(path, framework="pt") as file:
        names = [name for name in ARRAYS if name in {*file.keys()}]
        arrays = {n: file.get_tensor(n) if whole else file.get_slice(n)[frames] for n in names}
        description = json.loads((file.metadata() or {})["description"])
        return arrays, description | {"timestamps": file.get_tensor("timestamps").tolist()}


def _finish_npy(path: Path, record: RunRecord) -> Path:
    """Write the header for ``np.load(path, mmap_mode="r")``; metadata is in the sidecar."""
    descr = np.dtype(record.request["storage"]).newbyteorder("<").str
    (shape,) = record.shapes.values()
    fields = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    magic = np.lib.format.magic(1, 0)
    length = RESERVED - len(magic) - 2
    with path.open("r+b") as file:
        file.write(magic + struct.pack("<H", length) + repr(fields).encode().ljust(length - 1))
        file.write(b"\n")
    return path


def _read_npy(path: Path, frames: slice) -> Content:
    """Map values from disk; writing to them does not change the file."""
    name, *_ = (read_sidecar(path) or {}).get("arrays", ["features"])
    values = np.load(path, mmap_mode="c", allow_pickle=False)[frames]
    return {name: torch.from_numpy(values)}, None


def _finish_zarr(path: Path, record: RunRecord) -> Path:
    """Copy the values into a group of arrays and timestamps, in chunks of frames."""
    whole = path.with_suffix(".whole")
    group = _open_zarr(whole, "w")
    group.attrs.update({"description": record.description})
    arrays: dict[str, Any] = {name: _mapped(name, record) for name in record.shapes}
    frame_bytes = max(map(record.frame_bytes, arrays))
    chunk = min(len(record.timestamps), max(1, _CHUNK_BYTES // frame_bytes))
    for name, values in {**arrays, "timestamps": np.array(record.timestamps)}.items():
        _, names = ARRAYS[name]
        options: dict[str, Any] = {"shape": values.shape, "dtype": values.dtype, "fill_value": 0}
        options["chunks"] = (chunk, *values.shape[1:])
        # features hardly compress, and uncompressed bytes do not depend on a library's version
        if hasattr(group, "create_array"):
            array = group.create_array(name, compressors=None, dimension_names=names, **options)
        else:  # zarr 2, the last one for Python 3.10
            array = group.create_dataset(name, compressor=None, **options)
            array.attrs["_ARRAY_DIMENSIONS"] = list(names)
        if name != "timestamps":
            array.attrs["coordinates"] = "timestamps"
        for start in range(0, len(values), chunk):
            array[start : start + chunk] = values[start : start + chunk]
    return whole


def _read_zarr(path: Path, frames: slice) -> Content:
    group = _open_zarr(path, "r")
    description = group.attrs["description"] | {"timestamps": group["timestamps"][:].tolist()}
    arrays = {name: torch.from_numpy(group[name][frames]) for name in ARRAYS if name in group}
    return arrays, description


def _mapped(name: str, record: RunRecord) -> np.memmap[Any, Any]:
    """Map the values of an array while the file is completed."""
    dtype, shape = record.request["storage"], tuple(record.shapes[name])
    return np.memmap(record.values(name), dtype, "r", RESERVED, shape)


def _finish_parquet(path: Path, record: RunRecord) -> Path:
    """Write a table with a row for every frame: source, frame, time (seconds), vector."""
    arrow, parquet = _require_arrow("pyarrow"), _require_arrow()
    whole = path.with_suffix(".whole")
    ((name, (frames, width)),) = record.shapes.items()
    flat = rearrange(_mapped(name, record), "n c -> (n c)")
    columns = {
        "source": arrow.repeat(record.request["source"], frames),
        "frame": np.arange(frames),
        "time": np.array(record.timestamps),
        "vector": arrow.FixedSizeListArray.from_arrays(arrow.array(flat), width),  # not a copy
    }
    metadata = {"description": json.dumps(record.description)}
    parquet.write_table(arrow.table(columns, metadata=metadata), whole)
    return whole


def _read_parquet(path: Path, frames: slice) -> Content:
    table = _require_arrow().read_table(path)
    description = json.loads(table.schema.metadata[b"description"])
    name, *_ = description["arrays"]
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    vectors = rearrange(flat, "(n c) -> n c", n=table.num_rows)
    description["timestamps"] = table["time"].to_pylist()
    return {name: torch.from_numpy(vectors[frames].copy())}, description


def _finish_tracker(path: Path, record: RunRecord) -> Path:
    (shape,) = record.shapes.values()
    return save_tensor(path, path.with_suffix(".whole"), tuple(shape), offset=RESERVED)


def _read_tracker(path: Path, frames: slice) -> Content:
    features = torch.load(path, map_location="cpu", mmap=True, weights_only=True)[frames]
    return {"features": features}, None


def _require_zarr() -> Any:
    return require("zarr", extra="zarr", purpose="the zarr format")


def _require_arrow(module: str = "pyarrow.parquet") -> Any:
    return require(module, extra="parquet", purpose="the Parquet format")


def _open_zarr(path: Path, mode: str) -> Any:
    return _require_zarr().open_group(str(path), mode=mode)


_NUMPY, _ALL = ("float32", "float16"), tuple(_SAFETENSORS)  # NumPy has no bfloat16
FORMATS = {
    form.name: form
    for form in (
        Format(
            "safetensors", ".safetensors", _ALL, _finish_safetensors, _read_safetensors,
            several=True,
        ),
        Format("zarr", ".zarr", _NUMPY, _finish_zarr, _read_zarr, _require_zarr, several=True),
        Format("npy-memmap", ".npy", _NUMPY, _finish_npy, _read_npy),
        Format(
            "parquet", ".parquet", _NUMPY, _finish_parquet, _read_parquet, _require_arrow,
            tokens=("cls", "mean"),
        ),
        Format(
            "dino-tracker", ".pt", ("float32",), _finish_tracker, _read_tracker, tokens=("patch",)
        ),
    )
}  # fmt: skip
SUFFIXES = ", ".join(f"{form.suffix} ({form.name})" for form in FORMATS.values())


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """Features with their times, their geometry and a description of how they were made."""

    # by name: features (T, C, h, w), cls (T, C'), registers (T, R, C'), mean (T, C)
    arrays: Mapping[str, Tensor]
    timestamps: Tensor  # (T,) float64, seconds
    geometry: Geometry  # how patches map to pixels of the source's frames
    metadata: Mapping[str, Any]  # source, backbone, fingerprint, layers, settings and versions

    @property
    def features(self) -> Tensor:
        """The patch features ``(T, C, h, w)``; a ``ValueError`` if the file holds none."""
        if "features" not in self.arrays:
            names = ", ".join(f"arrays[{name!r}]" for name in self.arrays)
            raise ValueError(f"the file of {self.metadata['source']} has no features, but {names}")
        return self.arrays["features"]


def read_features(
    path: str | os.PathLike[str], *, start: int | None = None, stop: int | None = None
) -> FeatureFile:
    """Read a feature file of any format, or its frames from ``start`` to before ``stop``.

    Whole files are mapped from disk, except zarr and Parquet, which are copied. Metadata comes from
    the sidecar ``PATH.json``; safetensors, zarr and Parquet can be read without it.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFeatureFileError: truncated, or not a feature file.
        MissingExtraError: zarr or pyarrow is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    sidecar, frames = read_sidecar(path), slice(start, stop)
    form = format_of(path) if sidecar is None else FORMATS.get(sidecar.get("format", ""))
    if form is None:
        raise CorruptFeatureFileError(
            f"{path} is not a feature file: its suffix is none of {SUFFIXES}"
        )
    try:
        arrays, description = form.read(path, frames)
        arrays.pop("timestamps", None)  # of the range only; the metadata has all
        metadata = dict(sidecar or description or {})
        if not metadata:
            raise ValueError(f"its sidecar {sidecar_path(path).name} is missing")
        timestamps = torch.tensor(metadata.pop("timestamps"), dtype=torch.float64)
        geometry = Geometry.from_dict(metadata.pop("geometry"))
    except _UNREADABLE as error:
        raise CorruptFeatureFileError(
            f"{path} is truncated or not a file that `cosettle-adapter extract` wrote: {error}"
        ) from error
    return FeatureFile(arrays, timestamps[frames], geometry, metadata)


def format_of(path: Path) -> Format | None:
    """Return the format that a file's suffix tells, if any."""
    suffix = path.suffix.lower()
    return next((form for form in FORMATS.values() if form.suffix == suffix), None)


def choose_format(path: Path, name: str | None, kinds: Sequence[str] = ("patch",)) -> Format:
    """Return the format of an output, by ``name`` or suffix, and check that it can be written."""
    by_suffix = format_of(path)
    form = by_suffix if name is None else FORMATS.get(name)
    if form is None and name is not None:
        close = did_you_mean(name, FORMATS)
        raise FormatError(f"unknown format {name!r}; expected one of {', '.join(FORMATS)}.{close}")
    if form is None:
        raise FormatError(
            f"the suffix of {path.name} is not that of a format: use one of {SUFFIXES}, or give "
            "--format (format=)"
        )
    if by_suffix is not None and by_suffix is not form:
        raise FormatError(
            f"got format {form.name} for {path.name}, whose suffix is that of {by_suffix.name}: "
            f"use the suffix {form.suffix}, or another format"
        )
    if not {*kinds} <= {*form.tokens} or (len(kinds) > 1 and not form.several):
        several = " and ".join(other.name for other in FORMATS.values() if other.several)
        raise FormatError(
            f"{form.name} holds one of {', '.join(form.tokens)}, not {', '.join(kinds)}: give "
            f"--tokens {form.tokens[0]} (tokens={form.tokens[0]!r}); {several} hold any of them"
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
