"""Does a video's pooled feature tell its class? Nearest neighbours and a linear probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosettle_adapter.evaluation.variants import CENTRED, raw_same
from cosettle_adapter.evaluation.videos import (
    TEMPERATURE,
    PooledVideos,
    Predictions,
    held_out,
    nearest_votes,
    split_videos,
    with_centred,
)
from cosettle_adapter.imports import require

LINEAR = "linear probe"
PENALTIES = tuple(10.0**exponent for exponent in range(1, -7, -1))
_DEFAULT_PENALTY = 1e-2  # where the training set is too small to hold anything out
_CHOOSE_SHARE = 0.2  # of the training videos, to choose the linear probe's penalty by


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

    def taken_for(scores: Tensor, settings: Mapping[str, float | None]) -> Predictions:
        return Predictions(
            names=tuple(videos[row].name for row in val),
            labels=tuple(videos[row].label for row in val),
            predicted=tuple(classes[best] for best in scores.argmax(dim=1).tolist()),
            settings=settings,
        )

    results: dict[str, dict[str, Predictions]] = {}
    reference = {name: values[train] for name, values in pooled.features.items()}
    for name, values in with_centred(pooled.features, reference).items():
        votes = nearest_votes(values[train], numbers, values[val], ks=ks, classes=len(classes))
        results[name] = {
            f"{k}-NN": taken_for(tally, {"k": k, "temperature": TEMPERATURE})
            for k, tally in votes.items()
        }
        if len(classes) > 1 and name == CENTRED:  # the probe standardises: nothing changes
            results[name][LINEAR] = raw_same(results)[LINEAR]
        elif len(classes) > 1:
            probed = linear_probe(values[train], numbers, values[val], chosen_by)
            results[name][LINEAR] = taken_for(*probed)
    return results


def linear_probe(
    train: Tensor, labels: Tensor, queries: Tensor, chosen_by: Sequence[int]
) -> tuple[Tensor, dict[str, float | None]]:
    """Fit multinomial logistic regression with L2 to standardised features ``(N, C)``.

    It minimises mean cross entropy + penalty / 2 * the sum of squared weights, of one weight
    vector a class; the bias is free. The penalty is that of :data:`PENALTIES` with the best
    accuracy, then the lowest cross entropy, on the training rows ``chosen_by``, which are held out
    for that; the probe is then fitted to all. Without such rows the penalty is 0.01.

    Returns:
        Logits ``(Q, K)`` float64 of the queries ``(Q, C)`` for labels of 0 to K - 1, and
        ``penalty`` with the accuracy it was ``chosen_at``.
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

    penalty, accuracy = _DEFAULT_PENALTY, None
    if chosen_by:
        scores = []
        for each in PENALTIES:
            found = logits(~held, each, train[held])
            right = float((found.argmax(1) == labels[held]).double().mean())
            scores.append((right, -float(F.cross_entropy(found, labels[held])), each))
        accuracy, _, penalty = max(scores)
    found = logits(torch.ones_like(held), penalty, queries)
    return found, {"penalty": penalty, "chosen_at": accuracy}
