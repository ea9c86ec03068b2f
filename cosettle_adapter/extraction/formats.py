"""The table of formats, and reading a finished file of any of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cosettle_adapter.errors import did_you_mean
from cosettle_adapter.extraction.dino_tracker import TrackerStore
from cosettle_adapter.extraction.errors import DamagedFeatureFileError, FormatError
from cosettle_adapter.extraction.record import read_sidecar, sidecar_path
from cosettle_adapter.extraction.settings import dtype_name
from cosettle_adapter.extraction.stores import NpyStore, SafetensorsStore, Store, ZarrStore
from cosettle_adapter.video import Geometry

FORMATS: dict[str, type[Store]] = {
    store.name: store for store in (SafetensorsStore, ZarrStore, NpyStore, TrackerStore)
}


def format_of(path: str | os.PathLike[str]) -> type[Store] | None:
    """Return the format that a file's suffix tells, if any."""
    suffix = Path(path).suffix.lower()
    return next((store for store in FORMATS.values() if store.suffix == suffix), None)


def choose_format(path: Path, name: str | None) -> type[Store]:
    """Return the format of a file to be written.

    Raises:
        FormatError: no such format, or neither ``name`` nor the file's suffix tells one, or they
            disagree.
    """
    if name not in (None, *FORMATS):
        known, close = ", ".join(FORMATS), did_you_mean(str(name), FORMATS)
        raise FormatError(f"unknown format {name!r}; there are {known}.{close}")
    by_suffix = format_of(path)
    store = by_suffix if name is None else FORMATS[name]
    if store is None:
        known = ", ".join(f"{each.suffix} ({each.name})" for each in FORMATS.values())
        raise FormatError(
            f"{path.name} does not tell its format by its suffix: end it in one of {known}, "
            "or give --format (format=)"
        )
    if by_suffix not in (None, store):
        raise FormatError(
            f"{path.name} is to be {store.name}, but its suffix is not {store.suffix}: "
            f"end it in {store.suffix}"
        )
    return store


def storage_dtype(
    store: type[Store], wanted: str | torch.dtype | None, computed: torch.dtype
) -> torch.dtype:
    """Return the dtype in which features are stored: ``wanted``, or else the adapter's own.

    Raises:
        FormatError: the format cannot store it.
    """
    dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted or computed
    if dtype in store.dtypes:
        return dtype
    name, default = dtype_name(dtype), dtype_name(store.dtypes[0])
    able = [other.name for other in FORMATS.values() if dtype in other.dtypes]
    how = f"; {name} goes into {' or '.join(able)}" if able else ""
    raise FormatError(
        f"{store.name} stores {' or '.join(map(dtype_name, store.dtypes))}, not {name}: "
        f"give --storage {default} (storage=torch.{default}){how}"
    )


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """What :func:`read_features` returns.

    Attributes:
        features: ``(T, C, h, w)``.
        timestamps: ``(T,)`` float64, seconds.
        geometry: how patches map to pixels of the source's frames.
        metadata: source, backbone, fingerprint, layers, settings and versions.
    """

    features: Tensor
    timestamps: Tensor
    geometry: Geometry
    metadata: Mapping[str, Any]


def read_features(
    path: str | os.PathLike[str], *, start: int | None = None, stop: int | None = None
) -> FeatureFile:
    """Read a feature file of any format.

    Safetensors and ``.npy`` files are mapped from disk, not copied, if all frames are read; zarr
    is read into memory.

    Args:
        path: the file, or the folder of a zarr group; its sidecar lies beside it. Without one,
            safetensors and zarr are read by the description they hold themselves.
        start: first frame.
        stop: frame to stop before.

    Raises:
        FileNotFoundError: no such file.
        CorruptFeatureFileError: truncated, or not a feature file.
        MissingExtraError: the format needs a package that is not installed.
    """
    path = Path(path)
    metadata: Mapping[str, Any]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    sidecar = read_sidecar(path)
    store = format_of(path) if sidecar is None else FORMATS.get(sidecar["format"])
    if store is None:
        known = ", ".join(each.suffix for each in FORMATS.values())
        raise DamagedFeatureFileError(
            f"{path} is not a feature file: its suffix is none of {known}"
        )
    try:
        features = store.read(path, start, stop)
        if sidecar is not None:
            timestamps = torch.tensor(sidecar.pop("timestamps"), dtype=torch.float64)
            geometry, metadata = Geometry.from_dict(sidecar.pop("geometry")), sidecar
        elif (description := store.describe(path)) is not None:
            timestamps, geometry, metadata = description
        else:
            raise ValueError(f"its sidecar {sidecar_path(path).name} is missing")
    except (SafetensorError, KeyError, OSError, TypeError, ValueError) as error:
        raise DamagedFeatureFileError(
            f"{path} is truncated or not a file that `cosettle-adapter extract` wrote: {error}"
        ) from error
    return FeatureFile(features, timestamps[start:stop], geometry, metadata)
