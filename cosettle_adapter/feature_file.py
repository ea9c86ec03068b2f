"""Reading what ``extract`` wrote, whatever its format."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cosettle_adapter.errors import CorruptWeightsError
from cosettle_adapter.extraction.formats import FORMATS, Format, format_of
from cosettle_adapter.extraction.formats.base import Description
from cosettle_adapter.extraction.sidecar import read_sidecar, sidecar_path
from cosettle_adapter.video.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """What :func:`read_features` returns.

    Attributes:
        features: ``(T, C, h, w)``.
        timestamps: ``(T,)`` float64, seconds.
        geometry: how cells map to pixels of the source's frames.
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

    Safetensors and ``.npy`` files are mapped from disk, not copied, as long as the whole is asked
    for; zarr is read into memory.

    Args:
        path: the file, or the folder that a zarr group is; its sidecar lies beside it. Without
            one, safetensors and zarr are read by what they say of themselves.
        start: first frame.
        stop: frame to stop before.

    Raises:
        FileNotFoundError: no such file.
        CorruptWeightsError: truncated, or not a feature file.
        MissingExtraError: the format needs a package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    row = _row(path)
    try:
        features = row.read(path, start, stop)
        said = _description(path, row)
    except (SafetensorError, KeyError, OSError, TypeError, ValueError) as error:
        raise CorruptWeightsError(
            f"{path} is truncated or not a file that `cosettle-adapter extract` wrote: {error}"
        ) from error
    return FeatureFile(features, said.timestamps[start:stop], said.geometry, said.metadata)


def _row(path: Path) -> Format:
    sidecar = read_sidecar(path)
    row = FORMATS.get(sidecar["format"]) if sidecar is not None else format_of(path)
    if row is None:
        known = ", ".join(each.suffix for each in FORMATS.values())
        raise CorruptWeightsError(f"{path} is no feature file: its suffix is none of {known}")
    return row


def _description(path: Path, row: Format) -> Description:
    sidecar = read_sidecar(path)
    if sidecar is not None:
        metadata = dict(sidecar)
        timestamps = torch.tensor(metadata.pop("timestamps"), dtype=torch.float64)
        geometry = Geometry.from_dict(metadata.pop("geometry"))
        return Description(timestamps, geometry, metadata)
    if row.describe is None:
        raise ValueError(f"its sidecar {sidecar_path(path).name} is missing")
    return row.describe(path)
