"""Does a video's pooled feature tell its class? Nearest neighbours, a linear probe, retrieval."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import few
from cosettle_adapter.evaluation.variants import CENTRED, raw_same
from cosettle_adapter.evaluation.videos import LabelledVideo, PooledVideos, with_centred
from cosettle_adapter.imports import require

LINEAR = "linear probe"
PENALTIES = tuple(10.0**exponent for exponent in range(1, -7, -1))
_DEFAULT_PENALTY = 1e-2  # where the training set is too small to hold anything out
_TEMPERATURE = 0.07  # of the neighbours' weights, as in DINO's kNN evaluation
_CHUNK = 1024  # queries compared at a time
_VALIDATION = 0.25  # of each class
_CHOOSE_SHARE = 0.2  # of the training videos, to choose the linear probe's penalty by


class Predictions(NamedTuple):
    """What videos, or frames of videos, show and what they were taken for."""

    names: tuple[str, ...]  # of the videos, once for each label
    labels: tuple[str, ...]
    predicted: tuple[str, ...]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Label to how many show it and how many of them were recognised, in order of name."""
        pairs = Counter(zip(self.labels, self.predicted, strict=True))
        count = Counter(self.labels)
        return {label: (count[label], pairs[label, label]) for label in sorted(count)}

    @property
    def accuracy(self) -> float:
        """Share that was recognised, in [0, 1]."""
        return sum(correct for _, correct in self.counts.values()) / len(self.labels)

    @property
    def per_class(self) -> dict[str, float]:
        """Label to the share that was recognised, in order of name."""
        return {label: correct / count for label, (count, correct) in self.counts.items()}


def classify(
    pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10, 20), seed: int = 0
) -> dict[str, dict[str, Predictions]]:
    """Classify videos by every variant of their pooled features, all on the same split.

    ``ks`` are numbers of neighbours. ``seed`` is that of the split, where none was given (a
    quarter of each class is judged), and of the videos that choose the probe's penalty.

    Returns:
        Variant (centred features are raw ones minus the mean of the training videos) to method
        (``5-NN``, ... and ``linear probe``, given two classes to tell apart) to predictions.

    Raises:
        FrameError: a class with a single readable video, or a split that lacks a part.
        ValueError: a k below 1.
    """
    videos = pooled.videos
    train, val = split_videos(videos, seed=seed)
    labels = [videos[row].label for row in train]
    classes = sorted(set(labels))
    numbers = torch.tensor([classes.index(label) for label in labels])
    names = [videos[row].name for row in train]
    chosen_by = held_out(names, labels, share=_CHOOSE_SHARE, seed=seed)

    def taken_for(scores: Tensor) -> Predictions:
        return Predictions(
            tuple(videos[row].name for row in val),
            tuple(videos[row].label for row in val),
            tuple(classes[best] for best in scores.argmax(dim=1).tolist()),
        )

    results: dict[str, dict[str, Predictions]] = {}
    reference = {name: values[train] for name, values in pooled.features.items()}
    for name, values in with_centred(pooled.features, reference).items():
        votes = nearest_votes(values[train], numbers, values[val], ks=ks, classes=len(classes))
        results[name] = {f"{k}-NN": taken_for(tally) for k, tally in votes.items()}
        if len(classes) > 1 and name == CENTRED:  # the probe standardises: nothing changes
            results[name][LINEAR] = raw_same(results)[LINEAR]
        elif len(classes) > 1:
            logits, _ = linear_probe(values[train], numbers, values[val], chosen_by)
            results[name][LINEAR] = taken_for(logits)
    return results


def split_videos(videos: Sequence[LabelledVideo], *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split videos into rows to learn from and rows to be judged by.

    A given split is kept. Otherwise a quarter of each class is judged, see :func:`held_out`.

    Raises:
        FrameError: a class that there is nothing to learn from, or nothing to be judged by.
    """
    labels = [video.label for video in videos]
    given = any(video.part for video in videos)
    if given:
        val = [row for row, video in enumerate(videos) if video.part == "val"]
    else:
        val = held_out([video.name for video in videos], labels, share=_VALIDATION, seed=seed)
    train = sorted(set(range(len(videos))) - set(val))
    learnt, judged = ({labels[row] for row in rows} for rows in (train, val))
    lacking = sorted(map(repr, judged - learnt if given else learnt - judged))
    if not train or not val or lacking:
        few_videos = "no readable video to learn from of" if given else "a single readable video of"
        raise FrameError(
            f"got {len(train)} videos to learn from and {len(val)} to be judged by"
            + (f", and {few_videos} {few(lacking)}" if lacking else "")
            + "; expected both of every class: add videos or leave the class out"
        )
    return train, val


def held_out(names: Sequence[str], labels: Sequence[str], *, share: float, seed: int) -> list[int]:
    """Choose rows of every class: the nearest to ``share`` of it, at least one, never all.

    Classes of one row give none. Which rows depends on names and seed alone, not on order or
    platform, and a video that is added or missing moves few others.
    """
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        by_label[label].append(row)
    chosen: list[int] = []
    for rows in by_label.values():
        rows.sort(key=lambda row: hashlib.sha256(f"{seed}/{names[row]}".encode()).digest())
        chosen += rows[: min(max(1, math.floor(share * len(rows) + 0.5)), len(rows) - 1)]
    return sorted(chosen)


def nearest_votes(
    train: Tensor, labels: Tensor, queries: Tensor, *, ks: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Let the k nearest neighbours by cosine vote, as DINO's kNN evaluation does.

    Each of ``train`` ``(N, C)``, labelled in [0, classes), votes for its class with the weight
    exp(cosine / temperature) on each of ``queries`` ``(Q, C)``. Of equally near ones the earlier
    counts; where k is larger than N, all vote.

    Returns:
        k to votes ``(Q, classes)``, float64, each row summing to 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"got ks={tuple(ks)}, expected numbers of neighbours of at least 1")
    keys = F.normalize(train.double(), dim=1)
    votes = {k: keys.new_zeros(len(queries), classes) for k in ks}
    for start in range(0, len(queries), _CHUNK):
        part = F.normalize(queries[start : start + _CHUNK].double(), dim=1)
        cosine, order = (part @ keys.T).sort(dim=1, descending=True, stable=True)
        for k in ks:
            weights = torch.softmax(cosine[:, :k] / _TEMPERATURE, dim=1)
            votes[k][start : start + _CHUNK].scatter_add_(1, labels[order[:, :k]], weights)
    return votes


def linear_probe(
    train: Tensor, labels: Tensor, queries: Tensor, chosen_by: Sequence[int]
) -> tuple[Tensor, float]:
    """Fit multinomial logistic regression with L2 to standardised features ``(N, C)``.

    It minimises mean cross entropy + penalty / 2 * the sum of squared weights, of one weight
    vector a class; the bias is free. The penalty is that of :data:`PENALTIES` with the best
    accuracy, then the lowest cross entropy, on the training rows ``chosen_by``, which are held out
    for that; the probe is then fitted to all. Without such rows the penalty is 0.01.

    Returns:
        Logits ``(Q, K)`` float64 of the queries ``(Q, C)`` for labels of 0 to K - 1; the penalty.
    """
    models: Any = require("sklearn.linear_model", extra="eval", purpose="the linear probe")
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[list(chosen_by)] = True

    def logits(rows: Tensor, penalty: float, judged: Tensor) -> Tensor:
        features = train[rows].double()
        mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
        flat = scale <= torch.finfo(torch.float32).eps * features.abs().amax(dim=0)
        scale = torch.where(flat, torch.inf, scale)  # rounding is no variation
        # scikit-learn sums the cross entropy, and has one weight vector for two classes: the
        # difference of the two meant here, for which the penalty is half as large
        weight = (2 if int(labels.max()) == 1 else 1) / (penalty * len(features))
        model = models.LogisticRegression(C=weight, tol=1e-8, max_iter=2000)
        model.fit(((features - mean) / scale).numpy(), labels[rows].numpy())
        standard = (judged.double() - mean) / scale
        found = torch.from_numpy(model.decision_function(standard.numpy()))
        return torch.stack([torch.zeros_like(found), found], dim=1) if found.ndim == 1 else found

    penalty = _DEFAULT_PENALTY
    if chosen_by:
        scores = []
        for each in PENALTIES:
            found = logits(~held, each, train[held])
            right = float((found.argmax(1) == labels[held]).double().mean())
            scores.append((right, -float(F.cross_entropy(found, labels[held])), each))
        penalty = max(scores)[-1]
    return logits(torch.ones_like(held), penalty, queries), penalty


class Retrieval(NamedTuple):
    """Retrieval by one variant of features."""

    figures: Mapping[str, float]  # R@k and mAP over queries, see retrieve
    per_class: Mapping[str, float]  # mean average precision over a class's queries
    queries: tuple[str, ...]  # names of those with another video of their class to find
    searched: int  # number of videos


def retrieve(pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Retrieval]:
    """Search videos by cosine of every variant of their pooled features.

    ``R@k`` is the share of queries with a video of their class among the first k, for ``ks``; a
    query's average precision is the mean over all videos of its class of the precision down to
    their rank. Where a split was given, videos of ``val`` search those of ``train``; otherwise each
    searches all others. A query never finds itself; of equally near videos the earlier comes first.
    Centred features are raw ones minus the mean of the videos searched.

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
        searched = units[gallery]
        first_hit: list[int] = []  # rank of the first video of the query's class
        precision: dict[str, float] = {}
        by_class: defaultdict[str, list[float]] = defaultdict(list)
        for query in queries:
            order = (searched @ units[query]).sort(descending=True, stable=True).indices
            ranking = gallery[order.numpy()]
            hits = labels[ranking[ranking != query]] == labels[query]
            if hits.any():
                first_hit.append(int(hits.argmax()) + 1)
                # by rank: equally near videos have an order too
                found = float(metrics.average_precision_score(hits, -np.arange(len(hits))))
                precision[pooled.videos[query].name] = found
                by_class[str(labels[query])].append(found)
        if not precision:
            raise FrameError(
                "no query has another video of its class to find: expected classes of at least 2 "
                f"readable videos, got {len(queries)} queries and {len(gallery)} to search"
            )
        figures = {f"R@{k}": fmean(rank <= k for rank in first_hit) for k in ks}
        figures["mAP"] = fmean(precision.values())
        per_class = {label: fmean(by_class[label]) for label in sorted(by_class)}
        results[variant] = Retrieval(figures, per_class, tuple(precision), len(gallery))
    return results
