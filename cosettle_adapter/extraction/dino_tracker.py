"""Features for DINO-Tracker (github.com/AssafSinger94/dino-tracker), whose code stays as it is.

It reads features from one file: a float32 tensor ``(T, 1024, h, w)`` whose patches are centred at
pixel 7 + stride * k of frames of 476 x 854. Here frames are resized as everywhere in this package,
not by Lanczos as DINO-Tracker does it, and features keep their length;
``examples/dino_tracker_features.py`` does both its way, and prepares a whole folder.
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

# written into its code in several places, whatever its configs say
FRAME = (476, 854)
PATCH = 14
STRIDES = (7, 14)
CHANNELS = 1024  # of the residual that its DeltaDINO network adds to the features
LOCATION = "cuda:0"  # where torch.load puts it: its code indexes the tensor by others on the GPU

_LOCAL_HEADER, _ZIP64_FIELD = 30, 20  # bytes before the numbers, beside a name
_PADDING_FIELD = 0x4246  # torch.save's own mark, "FB"; readers skip it


def cells(stride: int, *, frame: tuple[int, int] = FRAME) -> Geometry:
    """Return its grid over frames of any size: 67 x 121 at stride 7, 34 x 61 at stride 14."""
    if stride not in STRIDES:
        raise DinoTrackerError(f"stride must be 7 or 14, got {stride}")
    return plan_geometry(*frame, patch=PATCH, stride=stride, size=FRAME)


def check_adapter(adapter: CoSettleAdapter) -> None:
    """Raise :class:`DinoTrackerError` for features of more channels than its network has."""
    if adapter.width > CHANNELS:
        raise DinoTrackerError(
            f"{adapter.backbone.row.name} has {adapter.width} channels, but DINO-Tracker adds a "
            f"residual of {CHANNELS} to them: take a backbone or a projection with at most "
            f"{CHANNELS} (cosettle-adapter list --backbones shows widths)"
        )


def plan_settings(adapter: CoSettleAdapter, settings: ExtractSettings) -> ExtractSettings:
    """Use frames of 476 x 854, or of the nearest sides that are whole patches."""
    check_adapter(adapter)
    if settings.size is not None or settings.fit != "resize":
        raise FormatError("DINO-Tracker's frames are 476 x 854: leave --size and --fit out")
    return dataclasses.replace(settings, size=adapter.geometry(*FRAME).padded)


def arrange(features: Tensor, geometry: Geometry, *, stride: int, first: int = 0) -> Tensor:
    """Put features onto DINO-Tracker's grid.

    Where the adapter's own patches lie there (patch 14, at that stride), features stay as they are;
    otherwise they are interpolated between the centres of patches.

    From ``(N, C, h, w)`` on ``geometry.grid`` to ``(N, 1024, h, w)`` float32; channels that they do
    not have are zero. Features that are zero or not finite are a :class:`DinoTrackerError`, which
    counts frames from ``first``.
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
            "DINO-Tracker divides by its length; check that this frame is a picture, and compute "
            "in float32"
        )
    return F.pad(features, (0, 0, 0, 0, 0, CHANNELS - features.shape[1]))


def save_tensor(numbers: Path, path: Path, shape: tuple[int, ...], *, offset: int = 0) -> Path:
    """Write what ``torch.save`` writes of a float32 tensor on a GPU, at constant memory.

    Its numbers are those of the file ``numbers`` from ``offset`` bytes on. The file is an
    uncompressed ZIP archive of them and a pickle that says what they are.
    """
    tensor = torch.from_numpy(np.memmap(numbers, np.float32, "c", offset, shape))
    described = io.BytesIO()
    _TensorPickler(described, tensor.numel()).dump(tensor)
    # a name alone would put the time of day into the file
    data = zipfile.ZipInfo("archive/data/0")
    # readers map the numbers, which begin at a multiple of 64 bytes behind this field
    padding = -(_LOCAL_HEADER + len(data.filename) + _ZIP64_FIELD + 4) % 64
    data.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(data, "w", force_zip64=True) as target:  # there may be more than 4 GB
            target.write(tensor.numpy().data)
        for name, text in (
            ("data.pkl", described.getvalue()),
            ("byteorder", sys.byteorder),
            ("version", "3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), text)
    return path


class _TensorPickler(pickle.Pickler):
    """Pickles a tensor as ``torch.save`` does, its ``count`` numbers being stored elsewhere."""

    def __init__(self, file: io.BytesIO, count: int) -> None:
        super().__init__(file, protocol=2)
        self._count = count

    def persistent_id(self, item: Any) -> Any:
        if torch.is_storage(item):
            return "storage", torch.FloatStorage, "0", LOCATION, self._count
        return None
