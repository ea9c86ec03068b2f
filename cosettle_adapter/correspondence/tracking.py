"""Nearest-neighbour point tracking with features alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence.matching import each_map, unit_map
from cosettle_adapter.errors import FrameError, GeometryError


class Tracks(NamedTuple):
    """Positions of points of frame 0 in every frame."""

    positions: Tensor  # (T, N, 2) fractional (row, col) in patches; integers are patch centres
    score: Tensor  # (T, N) cosine between the features of the point and of the best patch
    # (T, N) distance in patches between the point and the match in frame 0 of the feature at its
    # tracked position; above one or two the point is probably occluded
    cycle_error: Tensor


@torch.no_grad()
def track_points(
    features: Tensor | Iterable[Tensor],
    points: Tensor,
    *,
    radius_argmax: float = 2.0,
    temperature: float = 0.05,
    search_radius: float | None = None,
    unit_queries: bool = True,
) -> Tracks:
    """Track points of frame 0 by the nearest neighbour of their features.

    Every frame is matched with frame 0, so tracks neither drift nor are smoothed. A soft-argmax
    around the best patch refines its position to a fraction of a patch.

    Args:
        features: ``(T, C, h, w)``, or an iterable of maps ``(C, h, w)``; any floating dtype.
        points: ``(N, 2)`` fractional (row, col) in patches of frame 0, on the features' device;
            the grid spans ``[-0.5, h - 0.5] x [-0.5, w - 0.5]``.
        radius_argmax: radius in patches of the soft-argmax; 0 returns the best patch's centre.
        temperature: of the soft-argmax; lower values give the best patch more weight.
        search_radius: search radius in patches around the point's position in the frame before;
            default: the whole frame.
        unit_queries: scale features interpolated between patches to unit length; otherwise their
            smaller length flattens the soft-argmax.
    """
    valid_search = search_radius is None or search_radius >= 1
    if not (radius_argmax >= 0 and temperature > 0 and valid_search):
        raise ValueError(
            f"got radius_argmax={radius_argmax}, temperature={temperature} and "
            f"search_radius={search_radius}; expected 0 or more patches, a positive temperature, "
            "and at least 1 patch or None"
        )
    refine = (radius_argmax, temperature)
    positions, scores, errors = [], [], []
    first: Tensor | None = None
    for features_t in each_map(features):
        here = unit_map(features_t)
        if first is None:
            first = here
            origin = last = _check_points(points, first)
            queries = _sample(first, origin)
            queries = F.normalize(queries, dim=1) if unit_queries else queries
        elif here.shape != first.shape:
            raise GeometryError(
                f"got a map of shape {tuple(here.shape)} after a first map of shape "
                f"{tuple(first.shape)}; all frames of a clip need the same shape"
            )
        last, score = _match(here, queries, refine, last, search_radius)
        matched = F.normalize(_sample(here, last), dim=1)
        back, _ = _match(first, matched, refine, origin, None)
        positions.append(last)
        scores.append(score)
        errors.append((back - origin).norm(dim=1))
    if not positions:
        raise FrameError("got no feature maps to track points through; expected at least one")
    return Tracks(torch.stack(positions), torch.stack(scores), torch.stack(errors))


def _check_points(points: Tensor, first: Tensor) -> Tensor:
    if points.ndim != 2 or points.shape[1] != 2:
        raise GeometryError(
            f"got points of shape {tuple(points.shape)}, expected (N, 2): (row, col) in patches"
        )
    points = points.to(first)
    size = torch.tensor(first.shape[1:]).to(first)
    outside = ((points < -0.5) | (points > size - 0.5) | points.isnan()).any(1)
    if outside.any():
        rows, columns = first.shape[1:]
        raise GeometryError(
            f"got the point {points[outside][0].tolist()}, which is outside the grid: expected "
            f"(row, col) from -0.5 to ({rows - 0.5}, {columns - 0.5}), that is pixels / patch - 0.5"
        )
    return points


def _sample(features: Tensor, points: Tensor) -> Tensor:
    """Features ``(N, C)`` at (row, col) points, bilinear."""
    size = torch.tensor(features.shape[1:]).to(points)
    grid = ((2 * points + 1) / size - 1).flip(-1)
    sampled = F.grid_sample(
        rearrange(features, "c h w -> 1 c h w"),
        rearrange(grid, "n xy -> 1 n 1 xy"),
        padding_mode="border",
        align_corners=False,
    )
    return rearrange(sampled, "1 c n 1 -> n c")


def _match(
    features: Tensor,
    queries: Tensor,
    refine: tuple[float, float],
    around: Tensor,
    search_radius: float | None,
) -> tuple[Tensor, Tensor]:
    """Best positions ``(N, 2)`` of queries ``(N, C)`` in a map, and their cosines ``(N,)``."""
    radius, temperature = refine
    height, width = features.shape[1:]
    centres = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(features)
    cosine = einsum(queries, features, "n c, c h w -> n h w")
    cosine = rearrange(cosine, "n h w -> n (h w)")
    if search_radius is not None:
        cosine = cosine.masked_fill(_distances(around, centres) > search_radius, -math.inf)
    score, best = cosine.max(1)
    near = _distances(centres[best], centres) <= radius
    weights = torch.softmax((cosine / temperature).masked_fill(~near, -math.inf), dim=1)
    return weights @ centres, score


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # For many points cdist multiplies matrices by default, with errors of 1e-3 patches.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
