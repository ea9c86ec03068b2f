"""Features for DINO-Tracker (github.com/AssafSinger94/dino-tracker), whose code stays as it is.

It reads features from one file: a float32 tensor ``(T, 1024, h, w)`` whose patches are centred at
pixel 7 + stride * k of frames of 476 x 854. Here frames are resized as everywhere in this package,
not by Lanczos as DINO-Tracker does it, and features keep their length;
``examples/dino_tracker_features.py`` does both its way, and prepares a whole folder.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.extraction.errors import DinoTrackerError, FormatError
from cosettle_adapter.extraction.settings import ExtractSettings
from cosettle_adapter.extraction.stores import FlatStore
from cosettle_adapter.video import Geometry, plan_geometry, resample_to_points

# written into its code in several places, whatever its configs say
FRAME = (476, 854)
PATCH = 14
STRIDES = (7, 14)
CHANNELS = 1024  # of the residual that its DeltaDINO network adds to the features

_ARCHIVE = "archive"
_HEADER = 128  # bytes before the numbers: two alignments of torch.save, so they can be mapped
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20
_PADDING_FIELD = 0x4246  # torch.save's own mark, "FB"; readers skip it


class TrackerStore(FlatStore):
    """DINO-Tracker's ``dino_embed_video.pt``; timestamps are in the sidecar alone.

    Attributes:
        location: the device the tensor is loaded to unless ``map_location`` says otherwise.
            DINO-Tracker runs on nothing but a GPU, wherever the file was written.
    """

    name = "dino-tracker"
    suffix = ".pt"
    dtypes = (torch.float32,)
    reserved = _HEADER
    location: str = "cuda:0"

    def finish(self, timestamps: Tensor) -> None:
        """Make it a file for ``torch.load``."""
        del timestamps
        finish_tensor(self._file, (self.frames, *self.record.shape), location=self.location)
        self._file.flush()

    @staticmethod
    def read(path: Path, start: int | None, stop: int | None) -> Tensor:
        """Return features, mapped from disk."""
        features: Tensor = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return features[start:stop]

    @classmethod
    def plan(cls, adapter: CoSettleAdapter, settings: ExtractSettings) -> ExtractSettings:
        """Use frames of 476 x 854, or of the nearest sides that are whole patches.

        Raises:
            DinoTrackerError: the adapter has more channels than DINO-Tracker's network.
            FormatError: a frame size or a fit was given.
        """
        check_adapter(adapter)
        if settings.size is not None or settings.fit != "resize":
            raise FormatError("DINO-Tracker's frames are 476 x 854: leave --size and --fit out")
        patch, stride = adapter.backbone.patch, adapter.backbone.stride
        size = plan_geometry(*FRAME, patch=patch, stride=stride).padded
        return dataclasses.replace(settings, size=size, storage=settings.storage or torch.float32)

    @classmethod
    def arrange(
        cls, features: Tensor, geometry: Geometry, *, first: int
    ) -> tuple[Tensor, Geometry]:
        """Put features onto its grid: of stride 7 where the adapter's is 7, otherwise of 14."""
        stride = 7 if geometry.stride == 7 else 14
        arranged = arrange(features, geometry, stride=stride, first=first)
        return arranged, cells(stride, frame=geometry.frame)


def cells(stride: int, *, frame: tuple[int, int] = FRAME) -> Geometry:
    """Return DINO-Tracker's grid over a frame: 67 x 121 at stride 7, 34 x 61 at stride 14.

    Args:
        stride: 7 or 14.
        frame: (H, W) before it is resized to 476 x 854.

    Raises:
        DinoTrackerError: another stride.
    """
    if stride not in STRIDES:
        raise DinoTrackerError(f"stride must be 7 or 14, got {stride}")
    return plan_geometry(*frame, patch=PATCH, stride=stride, size=FRAME)


def check_adapter(adapter: CoSettleAdapter) -> None:
    """Refuse features of more channels than DINO-Tracker's network has.

    Raises:
        DinoTrackerError: they have more.
    """
    if adapter.width > CHANNELS:
        raise DinoTrackerError(
            f"{adapter.backbone.row.name} has {adapter.width} channels, but DINO-Tracker adds a "
            f"residual of {CHANNELS} to them: take a backbone or a projection with at most "
            f"{CHANNELS} (cosettle-adapter list --backbones shows widths)"
        )


def arrange(features: Tensor, geometry: Geometry, *, stride: int, first: int = 0) -> Tensor:
    """Put features onto DINO-Tracker's grid.

    Where the adapter's own patches lie there (patch 14, at that stride), features stay as they are;
    otherwise they are interpolated between the centres of patches.

    Args:
        features: ``(N, C, h, w)`` on ``geometry.grid``, C at most 1024.
        geometry: how frames, of whatever size, became that grid.
        stride: 7 or 14.
        first: number of the first frame, for errors.

    Returns:
        ``(N, 1024, h, w)`` float32 on their device; channels that they do not have are zero.

    Raises:
        DinoTrackerError: a feature is zero or not finite.
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


def finish_tensor(file: BinaryIO, shape: tuple[int, ...], *, location: str) -> None:
    """Turn a file that holds a tensor's numbers into one for ``torch.load``.

    ``torch.save`` wants the whole tensor in memory. Its file is an uncompressed ZIP archive of the
    numbers and a pickle that says what they are; so the numbers can be appended as they come, after
    space for the header of the archive, and the rest be written once their count is known.

    Args:
        file: open for reading and writing; float32 numbers from byte 128 on. What follows them is
            cut off.
        shape: shape of the tensor.
        location: the device the tensor is loaded to unless ``map_location`` says otherwise:
            ``"cpu"`` or ``"cuda:0"``.
    """
    numbers = zipfile.ZipInfo(f"{_ARCHIVE}/data/0")
    padding = _HEADER - _LOCAL_HEADER - len(numbers.filename) - _ZIP64_FIELD - 4
    numbers.extra = struct.pack("<HH", _PADDING_FIELD, padding) + b"Z" * padding
    numbers.file_size = numbers.compress_size = 4 * math.prod(shape)
    file.truncate(_HEADER + numbers.file_size)
    numbers.header_offset = numbers.CRC = 0
    file.seek(_HEADER)
    while piece := file.read(1 << 20):
        numbers.CRC = zlib.crc32(piece, numbers.CRC)
    file.seek(0)
    # there may be more than 4 GiB, which a header without ZIP64 could not say
    file.write(numbers.FileHeader(zip64=True))
    file.seek(_HEADER + numbers.file_size)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.infolist().append(numbers)
        for name, content in (
            ("data.pkl", _description(shape, location)),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
        ):
            # a name alone would put the time of day into the file
            archive.writestr(zipfile.ZipInfo(f"{_ARCHIVE}/{name}"), content)


class _Storage:
    """Stands for the numbers, which the pickle only names."""


class _Described:
    """Is pickled as a contiguous tensor of one shape over :class:`_Storage` would be."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self._shape, device="meta").stride()
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Storage(), 0, self._shape, stride, False, OrderedDict())


def _description(shape: tuple[int, ...], location: str) -> bytes:
    """``data.pkl`` as ``torch.save`` writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if isinstance(item, _Storage):
                return ("storage", torch.FloatStorage, "0", location, math.prod(shape))
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(_Described(shape))
    return stream.getvalue()
