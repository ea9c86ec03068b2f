"""Patches of two frames of one video that show the same thing."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from cosettle_adapter.correspondence import mutual_nearest
from cosettle_adapter.correspondence.maps import unit_map

TEMPERATURE = 0.05


def corresponding_patches(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Find patches of two frames of one video that show the same thing.

    Mutual nearest neighbours by cosine once the two frames' mean is taken off: the common
    component hides the differences.

    Args:
        here: ``(C, h, w)`` floats.
        there: ``(C, h, w)`` floats of another frame.

    Returns:
        Their patches, not centred, ``(M, C)`` each; none where the frames do not differ at all,
        because a still frame says nothing about motion.
    """
    maps = torch.stack([here, there])
    flat = rearrange(maps, "two c h w -> two (h w) c")
    if torch.equal(here, there):
        return flat[0, :0], flat[1, :0]
    centred = _centred(maps)
    pairs, _ = mutual_nearest(centred[0], centred[1])
    return flat[0, pairs[:, 0]], flat[1, pairs[:, 1]]


@torch.no_grad()
def soft_correspondences(
    here: Tensor, there: Tensor, *, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor, Tensor]:
    """Say of every two patches of two frames how far they show the same thing.

    The chance to walk from one to the other and back, when every step goes by cosine (of centred
    tokens, as in :func:`corresponding_patches`): ``softmax_j(cos / t) softmax_i(cos / t)``.
    Mutual nearest neighbours are the limit of a low temperature.

    Args:
        here: ``(C, h, w)`` floats.
        there: ``(C, h, w)`` floats of another frame.
        temperature: positive; the lower, the fewer pairs share the weight.

    Returns:
        Patches ``(N, C)`` and ``(M, C)``, not centred, and weights ``(N, M)``; all zero where the
        frames do not differ at all.
    """
    maps = torch.stack([here, there])
    flat = rearrange(maps, "two c h w -> two (h w) c")
    if torch.equal(here, there):
        return flat[0], flat[1], flat.new_zeros(len(flat[0]), len(flat[1]))
    centred = _centred(maps)
    rows = rearrange(unit_map(centred[0]), "c h w -> (h w) c")
    columns = rearrange(unit_map(centred[1]), "c h w -> c (h w)")
    cosine = rows @ columns / temperature
    return flat[0], flat[1], cosine.softmax(0) * cosine.softmax(1)


def _centred(maps: Tensor) -> Tensor:
    return maps - reduce(maps, "two c h w -> 1 c 1 1", "mean")
