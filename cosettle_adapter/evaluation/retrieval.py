"""Does a video find others of its class? Nearest by cosine of pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.videos import PooledVideos, with_centred
from cosettle_adapter.imports import require


class Retrieval(NamedTuple):
    """Retrieval by one variant of features.

    Attributes:
        recall: k to R@k, the share of queries with a video of their class among the first k.
        mean_average_precision: over queries, in (0, 1]; a query's average precision is the mean
            over all videos of its class of the precision down to their rank.
        per_class: class to mean average precision over its queries.
        queries: names of the queries that count, those with another video of their class to find.
        searched: number of videos that were searched.
    """

    recall: Mapping[int, float]
    mean_average_precision: float
    per_class: Mapping[str, float]
    queries: tuple[str, ...]
    searched: int

    @property
    def figures(self) -> dict[str, float]:
        """What tables show."""
        recall = {f"R@{k}": share for k, share in self.recall.items()}
        return recall | {"mAP": self.mean_average_precision}


def retrieve(pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Retrieval]:
    """Search videos by cosine of every variant of their pooled features, with recall at ``ks``.

    Where a split was given, videos of ``val`` search those of ``train``; otherwise each searches
    all others. A query never finds itself; of equally near videos the earlier comes first. Centred
    features are raw ones minus the mean of the videos searched.

    Raises:
        FrameError: no query has another video of its class to find.
        ValueError: a k below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"got ks={tuple(ks)}, expected ranks of at least 1")
    metrics: Any = require("sklearn.metrics", extra="eval", purpose="measuring retrieval")
    labels = np.array([video.label for video in pooled.videos])
    judged = np.array([video.part == "val" for video in pooled.videos])
    split = any(video.part for video in pooled.videos)
    gallery = np.flatnonzero(~judged) if split else np.arange(len(labels))
    queries = np.flatnonzero(judged) if split else gallery
    reference = {variant: values[gallery] for variant, values in pooled.features.items()}
    results = {}
    for variant, values in with_centred(pooled.features, reference).items():
        units = F.normalize(values.double(), dim=1)
        first_hit: dict[str, int] = {}  # rank of the first video of the query's class
        precision: dict[str, float] = {}
        by_class: dict[str, list[float]] = {}
        for query in queries:
            order = (units[gallery] @ units[query]).sort(descending=True, stable=True).indices
            ranking = gallery[order.numpy()]
            hits = labels[ranking[ranking != query]] == labels[query]
            if hits.any():
                name = pooled.videos[query].name
                first_hit[name] = int(hits.argmax()) + 1
                # by rank: equally near videos have an order too
                ranks = -np.arange(len(hits))
                precision[name] = float(metrics.average_precision_score(hits, ranks))
                by_class.setdefault(str(labels[query]), []).append(precision[name])
        if not precision:
            raise FrameError(
                "no query has another video of its class to find: expected classes of at least 2 "
                f"readable videos, got {len(queries)} queries and {len(gallery)} to search"
            )
        results[variant] = Retrieval(
            {k: fmean(rank <= k for rank in first_hit.values()) for k in ks},
            fmean(precision.values()),
            {label: fmean(by_class[label]) for label in sorted(by_class)},
            tuple(precision),
            len(gallery),
        )
    return results
