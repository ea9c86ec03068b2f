"""Patch tokens of a clip, and their nearest neighbours in another frame."""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError


def token_frames(features: Tensor, *, at_least: int) -> Tensor:
    """``(T, h w, C)`` float32 or wider."""
    if features.ndim != 4 or not features.is_floating_point():
        raise GeometryError(
            f"got features of shape {tuple(features.shape)} and dtype {features.dtype}, expected "
            "floats of shape (T, C, h, w)."
        )
    if len(features) < at_least:
        raise FrameError(f"got {len(features)} frames, expected at least {at_least}.")
    wide = features if features.dtype == torch.float64 else features.float()
    # whole tokens in memory: they are gathered and multiplied
    return rearrange(wide, "t c h w -> t (h w) c").contiguous()


def best_match(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Index of the key with the largest inner product, for each query."""
    return torch.cat([(block @ keys.T).argmax(dim=1) for block in torch.split(queries, chunk)])


def distances_to_next(frames: Tensor, chunk: int) -> Tensor:
    """Euclidean distance of every patch to its nearest one in the next frame.

    Args:
        frames: ``(T, N, C)``, centred: a large common offset would cost digits.
        chunk: patches compared at a time.

    Returns:
        ``(T - 1, N)``.
    """
    distances = []
    for here, there in pairwise(frames):
        nearest = there[_nearest_euclidean(here, there, chunk)]
        # measured anew: a distance read off the matrix product is far from 0 for equal patches
        distances.append((here - nearest).norm(dim=-1))
    return torch.stack(distances)


def _nearest_euclidean(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Index of the nearest key, for each query."""
    offsets = keys.square().sum(dim=-1) / 2
    chunks = torch.split(queries, chunk)
    return torch.cat([(block @ keys.T - offsets).argmax(dim=1) for block in chunks])
