"""Blocks of an affinity matrix: who may look where, and the best of each row."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from cosettle_adapter.correspondence.protocols import PropagationProtocol


def locality_mask(
    protocol: PropagationProtocol, queries: range, keys: range, short: int, *, like: Tensor
) -> Tensor:
    """Return 0 where a query may look and -inf elsewhere, to be added to cosines.

    Args:
        protocol: its radius and neighbourhood.
        queries: lines of the grid that the queries fill.
        keys: lines that the keys fill.
        short: cells a line.
        like: gives dtype and device.

    Returns:
        ``(queries * short, keys * short)``.
    """
    along = rearrange(_distances(queries, keys, like.device), "a b -> a 1 b 1")
    across = rearrange(_distances(range(short), range(short), like.device), "s t -> 1 s 1 t")
    if protocol.neighbourhood == "disk":
        near = along.square() + across.square() < protocol.radius**2
    else:
        near = torch.maximum(along, across) <= protocol.radius
    mask = like.new_zeros(near.shape).masked_fill_(~near, -torch.inf)
    return rearrange(mask, "a s b t -> (a s) (b t)")


def topk_of_lines(blocks: Tensor, short: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the top-k of every query over several frames, of whole lines of ``short`` cells each.

    Exact: the k best cells lie in the k lines with the best maxima, and a maximum is much cheaper
    than a sort.

    Args:
        blocks: ``(f, q, n)``, frames by queries by cells.
        short: cells a line.
        k: how many.

    Returns:
        Values and indices into the ``f n`` cells, ``(q, k)``, or fewer columns where there are
        fewer cells.
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
