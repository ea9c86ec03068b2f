"""Classification and retrieval of videos by pooled features."""

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
_DEFAULT_PENALTY = 1e-2  # if the training set is too small to hold videos out
_TEMPERATURE = 0.07  # of the neighbours' weights, as in DINO's kNN evaluation
_CHUNK = 1024  # queries compared at a time
_TEST_SHARE = 0.25  # of each class
_HELD_OUT_SHARE = 0.2  # of the training videos, to choose the linear probe's penalty


class Predictions(NamedTuple):
    """True and predicted labels of videos, or of frames of videos."""

    names: tuple[str, ...]  # video of each label
    labels: tuple[str, ...]
    predicted: tuple[str, ...]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Number of samples and of correct predictions by true label, in order of name."""
        pairs = Counter(zip(self.labels, self.predicted, strict=True))
        count = Counter(self.labels)
        return {label: (count[label], pairs[label, label]) for label in sorted(count)}

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in [0, 1]."""
        return sum(correct for _, correct in self.counts.values()) / len(self.labels)

    @property
    def per_class(self) -> dict[str, float]:
        """Share of correct predictions by true label, in order of name."""
        return {label: correct / count for label, (count, correct) in self.counts.items()}


def classify(
    pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10, 20), seed: int = 0
) -> dict[str, dict[str, Predictions]]:
    """Classify videos by every variant of their pooled features, all on the same split.

    ``ks`` are numbers of neighbours. ``seed`` draws the split, unless the folder has one (a
    quarter of each class is tested), and the videos that choose the probe's penalty. Centred
    features are the raw ones minus the mean of the training videos.

    Returns:
        Predictions by variant, then by method: ``5-NN`` and so on, and ``linear probe`` if there
        are at least two classes.
    """
    videos = pooled.videos
    train, val = split_videos(videos, seed=seed)
    labels = [videos[row].label for row in train]
    classes = sorted(set(labels))
    numbers = torch.tensor([classes.index(label) for label in labels])
    names = [videos[row].name for row in train]
    validation = held_out(names, labels, share=_HELD_OUT_SHARE, seed=seed)

    def predictions(scores: Tensor) -> Predictions:
        return Predictions(
            tuple(videos[row].name for row in val),
            tuple(videos[row].label for row in val),
            tuple(classes[best] for best in scores.argmax(dim=1).tolist()),
        )

    results: dict[str, dict[str, Predictions]] = {}
    reference = {name: values[train] for name, values in pooled.features.items()}
    for name, values in with_centred(pooled.features, reference).items():
        votes = nearest_votes(values[train], numbers, values[val], ks=ks, classes=len(classes))
        results[name] = {f"{k}-NN": predictions(by_class) for k, by_class in votes.items()}
        if len(classes) > 1 and name == CENTRED:  # the probe standardises its features anyway
            results[name][LINEAR] = raw_same(results)[LINEAR]
        elif len(classes) > 1:
            logits, _ = linear_probe(values[train], numbers, values[val], validation)
            results[name][LINEAR] = predictions(logits)
    return results


def split_videos(videos: Sequence[LabelledVideo], *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the rows of the training and of the test videos, by the folder's split if it has one.

    Otherwise a quarter of each class is tested, see :func:`held_out`.
    """
    labels = [video.label for video in videos]
    given = any(video.part for video in videos)
    if given:
        val = [row for row, video in enumerate(videos) if video.part == "val"]
    else:
        val = held_out([video.name for video in videos], labels, share=_TEST_SHARE, seed=seed)
    train = sorted(set(range(len(videos))) - set(val))
    trained, tested = ({labels[row] for row in rows} for rows in (train, val))
    lacking = sorted(map(repr, tested - trained if given else trained - tested))
    if not train or not val or lacking:
        problem = "no readable training video of" if given else "a single readable video of"
        raise FrameError(
            f"got {len(train)} videos to train on and {len(val)} to test on"
            + (f", and {problem} {few(lacking)}" if lacking else "")
            + "; expected both of every class: add videos or remove the class"
        )
    return train, val


def held_out(names: Sequence[str], labels: Sequence[str], *, share: float, seed: int) -> list[int]:
    """Choose about ``share`` of the rows of every class: at least one, never all, none of one row.

    The choice depends on names and seed alone, and adding or removing a video changes it little.
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

    ``train`` is ``(N, C)`` with labels in [0, classes), ``queries`` are ``(Q, C)``. A neighbour
    votes for its class with the weight exp(cosine / temperature). Of equally near ones the earlier
    comes first; if k exceeds N, all vote.

    Returns:
        Votes ``(Q, classes)`` by k, float64, each row summing to 1.
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
    train: Tensor, labels: Tensor, queries: Tensor, validation: Sequence[int]
) -> tuple[Tensor, float]:
    """Fit multinomial logistic regression with L2 to standardised features ``(N, C)``.

    It minimises mean cross entropy + penalty / 2 * the sum of squared weights, with one weight
    vector per class and free biases. The penalty is the one of :data:`PENALTIES` with the best
    accuracy, then the lowest cross entropy, on the training rows ``validation``, which are held
    out for this choice; then the probe is fitted to all rows. Without ``validation`` the penalty
    is 0.01.

    Returns:
        Logits ``(Q, K)`` float64 of the queries ``(Q, C)`` for labels of 0 to K - 1; the penalty.
    """
    models: Any = require("sklearn.linear_model", extra="eval", purpose="the linear probe")
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[list(validation)] = True

    def logits(rows: Tensor, penalty: float, samples: Tensor) -> Tensor:
        features = train[rows].double()
        mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
        flat = scale <= torch.finfo(torch.float32).eps * features.abs().amax(dim=0)
        scale = torch.where(flat, torch.inf, scale)  # constant up to rounding: ignore the channel
        # scikit-learn sums the cross entropy; for two classes its single weight vector is the
        # difference of the two vectors here, for which the penalty is half as large
        weight = (2 if int(labels.max()) == 1 else 1) / (penalty * len(features))
        model = models.LogisticRegression(C=weight, tol=1e-8, max_iter=2000)
        model.fit(((features - mean) / scale).numpy(), labels[rows].numpy())
        standard = (samples.double() - mean) / scale
        values = torch.from_numpy(model.decision_function(standard.numpy()))
        if values.ndim == 1:
            return torch.stack([torch.zeros_like(values), values], dim=1)
        return values

    penalty = _DEFAULT_PENALTY
    if validation:
        scores = []
        for candidate in PENALTIES:
            predicted = logits(~held, candidate, train[held])
            accuracy = float((predicted.argmax(1) == labels[held]).double().mean())
            cross_entropy = float(F.cross_entropy(predicted, labels[held]))
            scores.append((accuracy, -cross_entropy, candidate))
        penalty = max(scores)[-1]
    return logits(torch.ones_like(held), penalty, queries), penalty


class Retrieval(NamedTuple):
    """Results of retrieval by one variant of features."""

    figures: Mapping[str, float]  # R@k and mAP, see retrieve
    per_class: Mapping[str, float]  # mAP over the queries of a class
    queries: tuple[str, ...]  # names of the queries whose class has another video to find
    searched: int  # number of videos searched


def retrieve(pooled: PooledVideos, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Retrieval]:
    """Retrieve videos of the same class by cosine of every variant of their pooled features.

    ``R@k`` is the share of queries with a video of their class among the first k, for each of
    ``ks``; the average precision of a query is the mean, over all videos of its class, of the
    precision down to their rank. If the folder has a split, videos of ``val`` search those of
    ``train``; otherwise each searches all others. Of equally near videos the earlier comes first.
    Centred features are the raw ones minus the mean of the videos searched.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"got ks={tuple(ks)}, expected ranks of at least 1")
    metrics: Any = require("sklearn.metrics", extra="eval", purpose="measuring retrieval")
    labels = np.array([video.label for video in pooled.videos])
    tested = np.array([video.part == "val" for video in pooled.videos])
    split = any(video.part for video in pooled.videos)
    gallery = np.flatnonzero(~tested) if split else np.arange(len(labels))
    queries = np.flatnonzero(tested) if split else gallery
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
                # scored by rank, not by cosine, so that the order of equally near videos counts
                average = float(metrics.average_precision_score(hits, -np.arange(len(hits))))
                precision[pooled.videos[query].name] = average
                by_class[str(labels[query])].append(average)
        if not precision:
            raise FrameError(
                "no query has another video of its class to find: got "
                f"{len(queries)} queries and {len(gallery)} videos to search, expected classes of "
                "at least 2 readable videos; add videos"
            )
        figures = {f"R@{k}": fmean(rank <= k for rank in first_hit) for k in ks}
        figures["mAP"] = fmean(precision.values())
        per_class = {label: fmean(by_class[label]) for label in sorted(by_class)}
        results[variant] = Retrieval(figures, per_class, tuple(precision), len(gallery))
    return results
