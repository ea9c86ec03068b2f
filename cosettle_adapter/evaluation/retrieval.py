"""Does a video find others of its class? Nearest by cosine of pooled features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.labelled_videos import LabelledVideo
from cosettle_adapter.evaluation.pooling import PooledVideos, with_centred

_CHUNK = 512  # queries ranked at a time


@dataclasses.dataclass(frozen=True)
class Query:
    """What one video found.

    Attributes:
        name: of the query.
        label: its class.
        nearest: name of the video found first.
        first_hit: rank, from 1, of the first video of its class.
        average_precision: in (0, 1]: mean over all videos of its class of the precision down to
            their rank.
    """

    name: str
    label: str
    nearest: str
    first_hit: int
    average_precision: float


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Retrieval by one kind of features.

    Attributes:
        recall: k to R@k, the share of queries with a video of their class among the first k.
        queries: a row for each query.
        alone: names of queries without another video of their class to be found; not counted.
    """

    recall: Mapping[int, float]
    queries: tuple[Query, ...]
    alone: tuple[str, ...]

    @property
    def mean_average_precision(self) -> float:
        """Over queries, in (0, 1]."""
        return _mean([query.average_precision for query in self.queries])

    @property
    def per_class(self) -> dict[str, float]:
        """Class to mean average precision over its queries, in order of name."""
        labels = sorted({query.label for query in self.queries})
        return {
            label: _mean([q.average_precision for q in self.queries if q.label == label])
            for label in labels
        }


@dataclasses.dataclass(frozen=True)
class RetrievalReport:
    """Retrieval by every kind of features.

    Attributes:
        results: kind of features to result.
        gallery: number of videos that were searched.
        skipped: name to why, of videos that could not be read.
    """

    results: Mapping[str, Retrieval]
    gallery: int
    skipped: Mapping[str, str]


def retrieve(pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10)) -> RetrievalReport:
    """Search videos by every kind of their pooled features.

    Where a split was given, videos of ``val`` search those of ``train``; otherwise each searches
    all others.

    Args:
        pooled: see :func:`~cosettle_adapter.evaluation.pooling.pool_videos`.
        ks: ranks to report recall at.

    Returns:
        Results for raw, centred (minus the mean of the videos searched) and adapted features.

    Raises:
        FrameError: no query has another video of its class to find.
        ValueError: a k below 1.
    """
    rows = range(len(pooled.videos))
    split = any(video.part for video in pooled.videos)
    gallery = [row for row in rows if pooled.videos[row].part != "val"] if split else list(rows)
    queries = [row for row in rows if pooled.videos[row].part == "val"] if split else list(rows)
    reference = {name: values[gallery] for name, values in pooled.features.items()}
    features = with_centred(pooled.features, reference)
    results = {
        name: retrieve_features(
            values[queries],
            [pooled.videos[row] for row in queries],
            values[gallery],
            [pooled.videos[row] for row in gallery],
            ks=ks,
        )
        for name, values in features.items()
    }
    return RetrievalReport(results, len(gallery), dict(pooled.skipped))


@torch.no_grad()
def retrieve_features(
    queries: Tensor,
    query_videos: Sequence[LabelledVideo],
    gallery: Tensor,
    gallery_videos: Sequence[LabelledVideo],
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Search a gallery by cosine; a query never finds itself.

    Args:
        queries: ``(Q, C)`` floats.
        query_videos: their videos.
        gallery: ``(G, C)`` floats.
        gallery_videos: their videos; of equally near ones the earlier comes first.
        ks: ranks to report recall at.

    Raises:
        FrameError: no query has another video of its class to find.
        ValueError: a k below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"got ks={tuple(ks)}, expected ranks of at least 1")
    labels = {video.label: 0 for video in (*query_videos, *gallery_videos)}
    labels = {label: index for index, label in enumerate(labels)}
    wanted = torch.tensor([labels[video.label] for video in query_videos], dtype=torch.long)
    offered = torch.tensor([labels[video.label] for video in gallery_videos], dtype=torch.long)
    place = {video.name: index for index, video in enumerate(gallery_videos)}
    itself = torch.tensor([place.get(video.name, -1) for video in query_videos], dtype=torch.long)
    keys = F.normalize(gallery.double(), dim=1)
    units = F.normalize(queries.double(), dim=1)
    found: list[Query] = []
    alone: list[str] = []
    for start in range(0, len(units), _CHUNK):
        stop = min(start + _CHUNK, len(units))
        order = (units[start:stop] @ keys.T).sort(dim=1, descending=True, stable=True).indices
        for row, ranking in zip(range(start, stop), order, strict=True):
            ranking = ranking[ranking != itself[row]]
            hits = (offered[ranking] == wanted[row]).nonzero()[:, 0] + 1
            video = query_videos[row]
            if not len(hits):
                alone.append(video.name)
                continue
            precision = torch.arange(1, len(hits) + 1).double() / hits
            nearest = gallery_videos[int(ranking[0])].name
            found.append(
                Query(video.name, video.label, nearest, int(hits[0]), float(precision.mean()))
            )
    if not found:
        raise FrameError(
            "no query has another video of its class to find: expected classes of at least 2 "
            f"readable videos, got {len(query_videos)} queries and {len(gallery_videos)} to search"
        )
    recall = {k: _mean([float(query.first_hit <= k) for query in found]) for k in ks}
    return Retrieval(recall, tuple(found), tuple(alone))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
