"""Features on DINO-Tracker's grid: resampled where need be, checked, padded with channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.adapter import CoSettleAdapter
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.dino_tracker.cells import CHANNELS, cells
from cosettle_adapter.dino_tracker.errors import DinoTrackerError
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video.geometry import Geometry
from cosettle_adapter.video.resampling import resample_to_points

# a frame has up to 8107 cells
BATCH_SIZE = 4


def load_overlapping(
    load: Callable[..., CoSettleAdapter], stride: int, **options: Any
) -> CoSettleAdapter:
    """Load an adapter whose patches are ``stride`` pixels apart, if its backbone's can be.

    Feature maps have no stride to choose, and patches cannot be further apart than they are wide;
    such backbones keep the step they have, and their features are interpolated.

    Args:
        load: ``CoSettleAdapter.from_pretrained`` or ``CoSettleAdapter.raw``, with its arguments.
        stride: 7 or 14.
        **options: more arguments of ``load``.
    """
    try:
        return load(stride=stride, **options)
    except GeometryError:
        return load(**options)


def check_adapter(adapter: CoSettleAdapter) -> None:
    """Refuse features that are wider than DINO-Tracker's network.

    Raises:
        DinoTrackerError: they are.
    """
    if adapter.width > CHANNELS:
        raise DinoTrackerError(
            f"{adapter.backbone.row.name} has {adapter.width} channels, but DINO-Tracker adds a "
            f"residual of {CHANNELS} to them: take a backbone or a projection with at most "
            f"{CHANNELS} (cosettle-adapter list --backbones shows widths)"
        )


def tracker_features(
    adapter: CoSettleAdapter,
    frames: Iterable[Tensor],
    *,
    stride: int = 7,
    batch_size: int = BATCH_SIZE,
    temporal_fusion: FusionMode | None = None,
) -> Iterator[Tensor]:
    """Yield what DINO-Tracker expects of each frame, at constant memory.

    Args:
        adapter: best loaded by :func:`load_overlapping`.
        frames: ``(3, 476, 854)`` uint8, one by one.
        stride: 7 or 14.
        batch_size: frames a forward pass.
        temporal_fusion: as in :meth:`CoSettleAdapter.stream`.

    Yields:
        ``(1, 1024, h, w)`` float32 on the CPU: ``h, w`` is 67, 121 at stride 7, and 34, 61 at 14.

    Raises:
        DinoTrackerError: more than 1024 channels, or a feature that is zero or not finite.
    """
    check_adapter(adapter)
    chunks = adapter.stream(iter(frames), batch_size=batch_size, temporal_fusion=temporal_fusion)
    for chunk in chunks:
        # one by one: at stride 7 each takes 33 MB
        for index, frame in enumerate(chunk.features.detach()):
            number = chunk.start + index
            yield arrange(frame[None], chunk.geometry, stride=stride, number=number).cpu()


def arrange(features: Tensor, geometry: Geometry, *, stride: int, number: int = 0) -> Tensor:
    """Put features onto DINO-Tracker's grid.

    Features are centred at pixel 7 + stride * k of a frame of 476 x 854. Where the adapter's own
    cells are (patch 14, at that stride), they stay as they are; otherwise they are interpolated
    between the centres of cells.

    Args:
        features: ``(N, C, h, w)`` on ``geometry.grid``, C at most 1024.
        geometry: how frames, of whatever size, became that grid.
        stride: 7 or 14.
        number: which frame the first is, for errors.

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
    _check_norms(features, number)
    return F.pad(features, (0, 0, 0, 0, 0, CHANNELS - features.shape[1]))


def _check_norms(features: Tensor, number: int) -> None:
    norms = features.norm(dim=1)
    bad = ~((norms > 0) & norms.isfinite())
    if bool(bad.any()):
        index, row, col = bad.nonzero()[0].tolist()
        what = "zero" if bool(norms[index, row, col] == 0) else "not finite"
        raise DinoTrackerError(
            f"the feature of frame {number + index} at row {row}, column {col} is {what}, and "
            "DINO-Tracker divides by its length; look whether that frame is a picture, and "
            "compute in float32"
        )
