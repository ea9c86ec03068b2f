"""Cosines between patches of feature maps: unit length, who may match whom, the best matches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from einops import rearrange, reduce
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
    """Return one map with patches of unit length, at least in float32.

    Args:
        features: ``(C, h, w)`` or ``(1, C, h, w)``, any floating dtype.

    Returns:
        ``(C, h, w)``; patches of zeros stay zeros.

    Raises:
        GeometryError: another shape, an empty grid, or values that are not floating point.
    """
    if features.ndim == 4 and len(features) == 1:
        features = rearrange(features, "1 c h w -> c h w")
    if features.ndim != 3 or features.numel() == 0:
        raise GeometryError(
            f"got a feature map of shape {tuple(features.shape)}, expected (C, h, w) or "
            "(1, C, h, w) with at least one patch; pass the frames of a batch one by one"
        )
    if not features.is_floating_point():
        raise GeometryError(
            f"got features of dtype {features.dtype}, expected floating point; "
            "call .float() on them"
        )
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return F.normalize(features, dim=0)


def locality_mask(
    radius: float,
    neighbourhood: Literal["disk", "square"],
    queries: range,
    keys: range,
    short: int,
    *,
    like: Tensor,
) -> Tensor:
    """Return 0 where a query may look and -inf elsewhere, to be added to cosines.

    Args:
        radius: as in :class:`PropagationProtocol`.
        neighbourhood: as in :class:`PropagationProtocol`.
        queries: lines of the grid that the queries fill.
        keys: lines that the keys fill.
        short: patches in a line.
        like: gives dtype and device.

    Returns:
        ``(queries * short, keys * short)``.
    """
    along = rearrange(_distances(queries, keys, like.device), "a b -> a 1 b 1")
    across = rearrange(_distances(range(short), range(short), like.device), "s t -> 1 s 1 t")
    if neighbourhood == "disk":
        near = along.square() + across.square() < radius**2
    else:
        near = torch.maximum(along, across) <= radius
    mask = like.new_zeros(near.shape).masked_fill_(~near, -torch.inf)
    return rearrange(mask, "a s b t -> (a s) (b t)")


def topk_of_lines(blocks: Tensor, short: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the top-k of every query over several frames, made of whole lines of the grid.

    Exact: the k best patches lie in the k lines with the best maxima, and a maximum is much
    cheaper than a sort.

    Args:
        blocks: ``(f, q, n)``, frames by queries by patches.
        short: patches in a line.
        k: how many.

    Returns:
        Values and indices into the ``f n`` patches, ``(q, k)``, or fewer columns where there are
        fewer patches.
    """
    frames, _, n = blocks.shape
    if frames * n // short <= 2 * k:
        values, index = rearrange(blocks, "f q n -> q (f n)").topk(min(k, frames * n), dim=1)
        return values, index
    lines = rearrange(blocks, "f q (l s) -> f q l s", s=short)
    maxima = rearrange(reduce(lines, "f q l s -> f q l", "max"), "f q l -> q (f l)")
    best = maxima.topk(k, dim=1).indices  # of the f l lines
    query = rearrange(torch.arange(len(best), device=best.device), "q -> q 1")
    inside = lines[best // lines.shape[2], query, best % lines.shape[2]]
    values, chosen = rearrange(inside, "q k s -> q (k s)").topk(k, dim=1)
    return values, best.gather(1, chosen // short) * short + chosen % short


def _distances(a: range, b: range, device: torch.device) -> Tensor:
    first, second = (torch.arange(side.start, side.stop, device=device) for side in (a, b))
    return (rearrange(first, "a -> a 1") - second).abs()
