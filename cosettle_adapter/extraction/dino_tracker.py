"""Features for the unmodified code of DINO-Tracker (github.com/AssafSinger94/dino-tracker).

It reads a float32 tensor ``(T, 1024, h, w)`` from a file. The patches are centred at pixels
7 + stride * k of frames of 476 x 854. Unlike DINO-Tracker, which resizes frames with Lanczos and
normalises features, this module resizes as the rest of the package and keeps the features' length;
``examples/dino_tracker_features.py`` does both as DINO-Tracker does, and prepares a whole folder.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.extraction.settings import DinoTrackerError, ExtractSettings, FormatError
from cosettle_adapter.video import Geometry, plan_geometry, resample_to_points

# hard-coded in DINO-Tracker, regardless of its configs
FRAME = (476, 854)
PATCH = 14
STRIDES = (7, 14)
CHANNELS = 1024  # of the residual that its network DeltaDINO adds to the features
LOCATION = "cuda:0"  # device of the loaded tensor, which its code indexes by tensors on the GPU

_LOCAL_HEADER, _ZIP64_FIELD = 30, 20  # bytes before the data, in addition to the name
_PADDING_FIELD = 0x4246  # torch.save's id of this ZIP field, "FB"; readers skip it


def cells(stride: int, *, frame: tuple[int, int] = FRAME) -> Geometry:
    """Return DINO-Tracker's grid for any frame: 67 x 121 at stride 7, 34 x 61 at stride 14."""
    if stride not in STRIDES:
        raise DinoTrackerError(f"stride must be 7 or 14, got {stride}")
    return plan_geometry(*frame, patch=PATCH, stride=stride, size=FRAME)


def check_adapter(adapter: CoSettleAdapter) -> None:
    """Raise :class:`DinoTrackerError` if features have more channels than its network."""
    if adapter.width > CHANNELS:
        raise DinoTrackerError(
            f"{adapter.backbone.row.name} has {adapter.width} channels, but DINO-Tracker adds a "
            f"residual of {CHANNELS} channels: use a backbone or projection with at most "
            f"{CHANNELS} (cosettle-adapter list --backbones shows widths)"
        )


def plan_settings(adapter: CoSettleAdapter, settings: ExtractSettings) -> ExtractSettings:
    """Set the frame size to 476 x 854, or to the nearest whole patches of the adapter."""
    check_adapter(adapter)
    if settings.size is not None or settings.fit != "resize":
        raise FormatError("DINO-Tracker's frames are 476 x 854: leave --size and --fit out")
    return dataclasses.replace(settings, size=adapter.geometry(*FRAME).padded)


def arrange(features: Tensor, geometry: Geometry, *, stride: int, first: int = 0) -> Tensor:
    """Resample features to DINO-Tracker's grid.

    ``(N, C, h, w)`` features on ``geometry.grid`` become ``(N, 1024, h', w')`` float32, with zeros
    in the additional channels. If the grids agree (patch 14, same stride), features are copied;
    otherwise they are interpolated between patch centres.

    Raises:
        DinoTrackerError: a feature is zero or not finite; its frame is counted from ``first``.
    """
    points = cells(stride, frame=geometry.frame).cell_centers()
    features = features.float()
    own = geometry.cell_centers()
    if own.shape != points.shape or not torch.equal(own, points):
        features = resample_to_points(features, geometry, points)
    norms = features.norm(dim=1)
    bad = ~((norms > 0) & norms.isfinite())
    if bool(bad.any()):
        index, row, col = bad.nonzero()[0].tolist()
        what = "zero" if bool(norms[index, row, col] == 0) else "not finite"
        raise DinoTrackerError(
            f"the feature of frame {first + index} at row {row}, column {col} is {what}, and "
            "DINO-Tracker divides by its length; check that this frame shows an image, and "
            "compute in float32"
        )
    return F.pad(features, (0, 0, 0, 0, 0, CHANNELS - features.shape[1]))


def save_tensor(numbers: Path, path: Path, shape: tuple[int, ...], *, offset: int = 0) -> Path:
    """Write the file that ``torch.save`` writes for a float32 tensor on a GPU, in constant memory.

    The values are read from the file ``numbers`` at byte ``offset``. The result is an uncompressed
    ZIP archive of the values and a pickle that describes the tensor.
    """
    tensor = torch.from_numpy(np.memmap(numbers, np.float32, "c", offset, shape))
    description = io.BytesIO()
    _TensorPickler(description, tensor.numel()).dump(tensor)
    # passing only a name would write the current time into the file
    data = zipfile.ZipInfo("archive/data/0")
    # the values, which readers map into memory, begin at a multiple of 64 bytes after this field
    padding = -(_LOCAL_HEADER + len(data.filename) + _ZIP64_FIELD + 4) % 64
    data.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(data, "w", force_zip64=True) as target:  # for more than 4 GB
            target.write(tensor.numpy().data)
        for name, text in (
            ("data.pkl", description.getvalue()),
            ("byteorder", sys.byteorder),
            ("version", "3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), text)
    return path


class _TensorPickler(pickle.Pickler):
    """Pickles a tensor as ``torch.save`` does; its ``count`` values are stored elsewhere."""

    def __init__(self, file: io.BytesIO, count: int) -> None:
        super().__init__(file, protocol=2)
        self._count = count

    def persistent_id(self, item: Any) -> Any:
        if torch.is_storage(item):
            return "storage", torch.FloatStorage, "0", LOCATION, self._count
        return None
