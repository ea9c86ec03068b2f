"""Matching the patches of two feature maps by mutual similarity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError


def each_map(features: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield maps ``(C, h, w)`` from ``(T, C, h, w)`` or from an iterable of maps."""
    if isinstance(features, Tensor) and features.ndim != 4:
        shape = tuple(features.shape)
        raise GeometryError(f"got features of shape {shape}, expected (T, C, h, w) of one clip")
    yield from features


def unit_map(features: Tensor) -> Tensor:
    """Return a map ``([1,] C, h, w)`` as ``(C, h, w)`` with unit patches, at least in float32."""
    if features.ndim == 4 and len(features) == 1:
        features = features[0]
    if features.ndim != 3 or features.numel() == 0 or not features.is_floating_point():
        raise GeometryError(
            f"got a feature map of shape {tuple(features.shape)} and {features.dtype}, expected "
            "floating point (C, h, w) or (1, C, h, w); pass one frame at a time"
        )
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return F.normalize(features, dim=0)


def patch_distances(
    lines: range | slice, others: range | slice, short: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return distances between patches of two ranges of lines of ``short`` patches.

    In lines, ``(lines, 1, others, 1)``, and within a line, ``(1, short, 1, short)``.
    """
    first, second, patch = (
        torch.arange(r.start, r.stop, device=device) for r in (lines, others, slice(0, short))
    )
    along = rearrange(first, "a -> a 1 1 1") - rearrange(second, "b -> 1 1 b 1")
    across = rearrange(patch, "s -> 1 s 1 1") - rearrange(patch, "t -> 1 1 1 t")
    return along.abs(), across.abs()


@torch.no_grad()
def mutual_nearest(a: Tensor, b: Tensor, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the pairs of patches that are each other's nearest neighbour by cosine.

    Args:
        a: ``(C, h, w)``, any floating dtype.
        b: ``(C, h', w')`` on the same device; the grids may differ.
        chunk: patches of ``a`` compared at a time; bounds memory only.

    Returns:
        Row-major patch indices ``(M, 2)`` int64 in ``a`` (ascending) and ``b``, and the pairs'
        cosines ``(M,)``. Among equally near patches the first one is the nearest, so identical
        patches match at most once.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    a, b = unit_map(a), unit_map(b)
    if len(a) != len(b):
        raise GeometryError(
            f"got maps of {len(a)} and {len(b)} channels, expected the same number: "
            "compare features of one model"
        )
    rows, columns = rearrange(a, "c h w -> (h w) c"), rearrange(b, "c h w -> c (h w)")
    forth, cosine = [], []
    back_cosine = rows.new_full((columns.shape[1],), -torch.inf)
    back = torch.zeros(columns.shape[1], dtype=torch.long, device=rows.device)
    for start in range(0, len(rows), chunk):
        block = rows[start : start + chunk] @ columns
        best, index = block.max(1)
        forth.append(index)
        cosine.append(best)
        best, index = block.max(0)
        better = best > back_cosine
        back_cosine = torch.where(better, best, back_cosine)
        back = torch.where(better, index + start, back)
    nearest = torch.cat(forth)
    here = torch.arange(len(rows), device=rows.device)
    mutual = back[nearest] == here
    return torch.stack([here[mutual], nearest[mutual]], dim=1), torch.cat(cosine)[mutual]


def corresponding_patches(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Find patches of two frames ``(C, h, w)`` of one video that show the same thing.

    They are mutual nearest neighbours by cosine after subtracting the mean of both frames, which
    hides the differences between patches. Returns the original patches, ``(M, C)`` each; none if
    the frames are equal, because a still frame carries no information on motion.
    """
    flat, centred = _flat_and_centred(here, there)
    if torch.equal(here, there):
        return flat[0, :0], flat[1, :0]
    pairs, _ = mutual_nearest(centred[0], centred[1])
    return flat[0, pairs[:, 0]], flat[1, pairs[:, 1]]


@torch.no_grad()
def soft_correspondences(
    here: Tensor, there: Tensor, *, temperature: float = 0.05
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh every pair of patches of two frames by how likely both show the same thing.

    The weight is the probability of a random walk from one patch to the other and back, along
    cosines of centred patches: ``softmax_j(cos / t) softmax_i(cos / t)``. Mutual nearest neighbours
    are the limit of a low temperature t. Returns the original patches ``(N, C)`` and ``(M, C)`` and
    weights ``(N, M)``, all zero if the frames are equal.
    """
    flat, centred = _flat_and_centred(here, there)
    if torch.equal(here, there):
        return flat[0], flat[1], flat.new_zeros(len(flat[0]), len(flat[1]))
    rows = rearrange(unit_map(centred[0]), "c h w -> (h w) c")
    columns = rearrange(unit_map(centred[1]), "c h w -> c (h w)")
    cosine = rows @ columns / temperature
    return flat[0], flat[1], cosine.softmax(0) * cosine.softmax(1)


def _flat_and_centred(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Both frames as patches ``(2, N, C)``, and as maps ``(2, C, h, w)`` minus their mean."""
    maps = torch.stack([here, there])
    centred = maps - reduce(maps, "two c h w -> 1 c 1 1", "mean")
    return rearrange(maps, "two c h w -> two (h w) c"), centred
