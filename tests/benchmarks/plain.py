"""The other sides of the benchmarks, each written plainly from its definition, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

Mask = NDArray[np.bool_]


def near_patches(grid: tuple[int, int], radius: int, *, like: Tensor) -> Tensor:
    """1 where two patches are within ``radius`` rows and columns, `(h w, h w)`."""
    rows, columns = (torch.arange(side, device=like.device) for side in grid)
    near_rows = (rearrange(rows, "a -> a 1") - rows).abs() <= radius
    near_columns = (rearrange(columns, "a -> a 1") - columns).abs() <= radius
    near = rearrange(near_rows, "a b -> a 1 b 1") & rearrange(near_columns, "s t -> 1 s 1 t")
    return rearrange(near, "a s b t -> (a s) (b t)").to(like.dtype)


@torch.inference_mode()
def dense_labels(
    target: Tensor, context: Sequence[Tensor], labels: Sequence[Tensor], near: Tensor, *, topk: int
) -> Tensor:
    """Labels of one frame by whole affinities, as DINO's eval_video_segmentation.py has them."""
    query = F.normalize(rearrange(target, "c h w -> (h w) c"), dim=1)
    sources = torch.stack([rearrange(each, "c h w -> c (h w)") for each in context])
    affinity = torch.exp(query @ F.normalize(sources, dim=1) / 0.1) * near
    affinity = rearrange(affinity, "n target source -> (n source) target")
    least = affinity.topk(topk, dim=0).values.amin(0)
    affinity[affinity < least] = 0
    affinity /= affinity.sum(0, keepdim=True)
    known = torch.cat([rearrange(each, "k h w -> k (h w)") for each in labels], dim=1)
    return rearrange(known @ affinity, "k (h w) -> k h w", h=target.shape[1])


def boundary_f(annotation: Mask, mask: Mask) -> float:
    """F as davis2017-evaluation defines it: boundaries dilated by a disk of the tolerance."""

    def dilated(boundary: Mask, reach: int) -> Mask:
        y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
        return ndimage.binary_dilation(boundary, x**2 + y**2 <= reach**2)

    return _boundary_f(annotation, mask, dilated)


def boundary_f_by_distance(annotation: Mask, mask: Mask) -> float:
    """The same by a distance transform of the whole frame, SciPy's fastest plain way."""

    def within(boundary: Mask, reach: int) -> Mask:
        near: Mask = ndimage.distance_transform_edt(~boundary) <= reach
        return near

    return _boundary_f(annotation, mask, within)


def _boundary_f(annotation: Mask, mask: Mask, near: Callable[[Mask, int], Mask]) -> float:
    reach = int(np.ceil(0.008 * np.linalg.norm(mask.shape)))
    found, true = _boundary(mask), _boundary(annotation)
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    precision = np.sum(found & near(true, reach)) / found.sum()
    recall = np.sum(true & near(found, reach)) / true.sum()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def _boundary(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower right neighbour."""
    east, south, corner = (np.zeros_like(mask) for _ in range(3))
    east[:, :-1], south[:-1], corner[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edges: Mask = (mask ^ east) | (mask ^ south) | (mask ^ corner)
    edges[-1], edges[:, -1] = mask[-1] ^ east[-1], mask[:, -1] ^ south[:, -1]
    edges[-1, -1] = False
    return edges


def scene(
    grid: tuple[int, int], frames: int, channels: int, *, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Features `(frames, channels, h, w)` of a drifting scene with noise, labels `(4, h, w)`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, channels, *(max(2, side // 4) for side in grid), generator=generator)
    still = F.interpolate(coarse, size=grid, mode="bicubic")[0]
    noise = torch.randn(frames, channels, *grid, generator=generator)
    features = torch.stack([still.roll(t // 4, -1) for t in range(frames)]) + 0.5 * noise
    blobs = torch.randn(1, 4, *(max(2, side // 8) for side in grid), generator=generator)
    labels = (4 * F.interpolate(blobs, size=grid, mode="bilinear")[0]).softmax(0)
    return features.to(device), labels.to(device)


def object_masks(count: int, size: tuple[int, int]) -> tuple[Mask, Mask]:
    """Masks `(count, H, W)` of an irregular object, a twelfth of the frame, and guesses near it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.linspace(-1, 1, size[0])[:, None]
    x = torch.linspace(-1, 1, size[1])[None] * size[1] / size[0]
    coarse = torch.randn(count, 2, size[0] // 12, size[1] // 12, generator=generator)
    outline = F.interpolate(coarse, size=size, mode="bicubic")
    drift = torch.linspace(-0.5, 0.5, count)[:, None, None]
    distance = ((x - drift) ** 2 + y**2).sqrt() + 0.06 * outline[:, 0]
    guess = distance + 0.02 * outline[:, 1] < 0.44
    return (distance < 0.43).numpy(), guess.numpy()
