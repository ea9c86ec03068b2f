"""Does a video find others of its class? Nearest by cosine of pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch.nn.functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.videos import PooledVideos, with_centred
from cosettle_adapter.imports import require

_CHUNK = 512  # queries ranked at a time


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Retrieval:
    """Retrieval by one variant of features.

    Attributes:
        recall: k to R@k, the share of queries with a video of their class among the first k.
        queries: a row for each query.
        alone: names of queries without another video of their class to be found; not counted.
        searched: number of videos that were searched.
    """

    recall: Mapping[int, float]
    queries: tuple[Query, ...]
    alone: tuple[str, ...]
    searched: int

    @property
    def mean_average_precision(self) -> float:
        """Over queries, in (0, 1]."""
        return fmean(query.average_precision for query in self.queries)

    @property
    def per_class(self) -> dict[str, float]:
        """Class to mean average precision over its queries, in order of name."""
        return {
            label: fmean(q.average_precision for q in self.queries if q.label == label)
            for label in sorted({query.label for query in self.queries})
        }


def retrieve(pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Retrieval]:
    """Search videos by cosine of every variant of their pooled features.

    Where a split was given, videos of ``val`` search those of ``train``; otherwise each searches
    all others. A query never finds itself; of equally near videos the earlier comes first.

    Args:
        pooled: see :func:`~cosettle_adapter.evaluation.videos.pool_videos`.
        ks: ranks to report recall at.

    Returns:
        Results for raw, centred (minus the mean of the videos searched) and adapted features.

    Raises:
        FrameError: no query has another video of its class to find.
        ValueError: a k below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"got ks={tuple(ks)}, expected ranks of at least 1")
    metrics: Any = require("sklearn.metrics", extra="eval", purpose="measuring retrieval")
    names = np.array([video.name for video in pooled.videos])
    labels = np.array([video.label for video in pooled.videos])
    judged = np.array([video.part == "val" for video in pooled.videos])
    split = any(video.part for video in pooled.videos)
    gallery = np.flatnonzero(~judged) if split else np.arange(len(names))
    queries = np.flatnonzero(judged) if split else gallery
    reference = {variant: values[gallery] for variant, values in pooled.features.items()}
    results = {}
    for variant, values in with_centred(pooled.features, reference).items():
        units = F.normalize(values.double(), dim=1)
        found: list[Query] = []
        alone: list[str] = []
        for start in range(0, len(queries), _CHUNK):
            part = queries[start : start + _CHUNK]
            order = (units[part] @ units[gallery].T).sort(dim=1, descending=True, stable=True)
            for query, ranking in zip(part, gallery[order.indices.numpy()], strict=True):
                ranking = ranking[ranking != query]
                hits = labels[ranking] == labels[query]
                if not hits.any():
                    alone.append(str(names[query]))
                    continue
                found.append(
                    Query(
                        name=str(names[query]),
                        label=str(labels[query]),
                        nearest=str(names[ranking[0]]),
                        first_hit=int(hits.argmax()) + 1,
                        # by rank: equally near videos have an order too
                        average_precision=float(
                            metrics.average_precision_score(hits, -np.arange(len(hits)))
                        ),
                    )
                )
        if not found:
            raise FrameError(
                "no query has another video of its class to find: expected classes of at least 2 "
                f"readable videos, got {len(queries)} queries and {len(gallery)} to search"
            )
        recall = {k: fmean(query.first_hit <= k for query in found) for k in ks}
        results[variant] = Retrieval(recall, tuple(found), tuple(alone), len(gallery))
    return results
