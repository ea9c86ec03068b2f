"""Tracking points that are asked for in different frames, in pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cosettle_adapter.correspondence import track_points
from cosettle_adapter.errors import FrameError
from cosettle_adapter.video.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class QueryTracks(NamedTuple):
    """Where queried points are in every frame.

    Attributes:
        xy: ``(Q, T, 2)`` float64 (x, y) pixels of the clip's frames.
        cycle_error: ``(Q, T)`` patches by which a point misses itself on the way back.
    """

    xy: Tensor
    cycle_error: Tensor


def track_queries(
    features: Tensor,
    frames: Sequence[int] | NDArray[Any] | Tensor,
    points: Tensor,
    geometry: Geometry,
    **options: Any,
) -> QueryTracks:
    """Track points both ways from the frame that each is asked for in.

    Args:
        features: ``(T, C, h, w)``.
        frames: ``(Q,)`` frame of each query.
        points: ``(Q, 2)`` (x, y) pixels in that frame; one outside is moved to the edge.
        geometry: from frames to the grid.
        **options: what :func:`~cosettle_adapter.correspondence.track_points` takes.

    Raises:
        FrameError: a query in a frame that is not there.
    """
    asked = torch.as_tensor(frames).long()
    if len(asked) and not 0 <= int(asked.min()) <= int(asked.max()) < len(features):
        raise FrameError(
            f"got queries in frames {int(asked.min())} to {int(asked.max())}, expected 0 to "
            f"{len(features) - 1}"
        )
    h, w = features.shape[-2:]
    limits = torch.tensor([h, w], dtype=torch.float64) - 0.5
    places = geometry.pixels_to_cells(points.double()).clamp(min=-0.5).minimum(limits)
    xy = torch.zeros(len(asked), len(features), 2, dtype=torch.float64)
    error = torch.zeros(len(asked), len(features))
    for frame in sorted(set(asked.tolist())):
        chosen = asked == frame
        # frames are matched with the query's one by one, so their order does not matter
        maps = (features[index] for index in (frame, *range(len(features))))
        tracks = track_points(maps, places[chosen].to(features.device), **options)
        found = geometry.cells_to_pixels(tracks.positions[1:].double().cpu())
        xy[chosen] = rearrange(found, "t q two -> q t two")
        error[chosen] = rearrange(tracks.cycle_error[1:].float().cpu(), "t q -> q t")
    return QueryTracks(xy, error)
