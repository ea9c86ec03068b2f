"""Feature maps as they are given, checked and scaled to unit length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError


def each_map(features: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield maps ``(C, h, w)`` from ``(T, C, h, w)`` or from an iterable of maps.

    Raises:
        GeometryError: a tensor that is not ``(T, C, h, w)``.
    """
    if isinstance(features, Tensor) and features.ndim != 4:
        raise GeometryError(
            f"got features of shape {tuple(features.shape)}, expected (T, C, h, w); "
            "give one clip at a time"
        )
    yield from features


def unit_map(features: Tensor) -> Tensor:
    """Return one map with cells of unit length, at least in float32.

    Args:
        features: ``(C, h, w)`` or ``(1, C, h, w)``, any floating dtype.

    Returns:
        ``(C, h, w)``; cells of zeros stay zeros.

    Raises:
        GeometryError: another shape, an empty grid, or values that are not floating point.
    """
    if features.ndim == 4 and len(features) == 1:
        features = rearrange(features, "1 c h w -> c h w")
    if features.ndim != 3 or features.numel() == 0:
        raise GeometryError(
            f"got a feature map of shape {tuple(features.shape)}, expected (C, h, w) or "
            "(1, C, h, w) with at least one cell; batches of frames go in frame by frame"
        )
    if not features.is_floating_point():
        raise GeometryError(
            f"got features of dtype {features.dtype}, expected floating point; "
            "call .float() on them"
        )
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return F.normalize(features, dim=0)
