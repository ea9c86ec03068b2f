"""Two ways of asking frozen features for a class: their neighbours, and a linear layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = tuple(10.0**exponent for exponent in range(1, -7, -1))  # strongest first
_DEFAULT_PENALTY = 1e-2  # where the training set is too small to hold anything out
_CHUNK = 1024  # queries compared at a time


def nearest_votes(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    classes: int,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Let the nearest neighbours vote, as DINO's kNN evaluation does.

    Neighbours are nearest by cosine; each votes for its class with the weight
    exp(cosine / temperature). Of equally near ones the earlier counts.

    Args:
        train: ``(N, C)`` floats.
        labels: ``(N,)`` int64 in [0, classes).
        queries: ``(Q, C)``.
        ks: numbers of neighbours; all there are where a number is larger.
        classes: number of classes.
        temperature: of the weights; smaller trusts the nearest more.

    Returns:
        k to votes ``(Q, classes)``, float64, each row summing to 1.

    Raises:
        ValueError: nothing to compare with, a k below 1, or a temperature that is not positive.
    """
    if not len(train) or not ks or min(ks) < 1 or not temperature > 0:
        raise ValueError(
            f"got {len(train)} training features, ks={tuple(ks)}, temperature={temperature}; "
            "expected at least one feature, ks of at least 1 and a positive temperature"
        )
    keys = F.normalize(train.double(), dim=1)
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for block in torch.split(F.normalize(queries.double(), dim=1), _CHUNK):
        cosine, order = (block @ keys.T).sort(dim=1, descending=True, stable=True)
        for k in ks:
            weights = torch.softmax(cosine[:, :k] / temperature, dim=1)
            tally = weights.new_zeros(len(block), classes)
            votes[k].append(tally.scatter_add(1, labels[order[:, :k]], weights))
    empty = keys.new_zeros(0, classes)
    return {k: torch.cat([empty, *parts]) for k, parts in votes.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier on standardised features.

    Attributes:
        mean: ``(C,)`` of the training features.
        scale: ``(C,)``, their standard deviation; 1 where they do not vary.
        weight: ``(classes, C)``.
        bias: ``(classes,)``.
        penalty: of the squared weights.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """Return ``(N, classes)`` float64 for features ``(N, C)``."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)


class ChosenProbe(NamedTuple):
    """A probe, and the share of held-out training videos it got right (None if none were)."""

    probe: LinearProbe
    held_out_accuracy: float | None


def choose_probe(
    features: Tensor,
    labels: Tensor,
    held_out: Sequence[int],
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> ChosenProbe:
    """Choose the penalty on held-out training rows, then fit on all of them.

    Args:
        features: ``(N, C)`` training features.
        labels: ``(N,)`` int64 in [0, classes).
        held_out: rows to choose by: best accuracy, then lowest cross entropy. Without any the
            penalty is 0.01.
        classes: number of classes.
        penalties: to choose from.
    """
    if not held_out:
        return ChosenProbe(fit_probe(features, labels, _DEFAULT_PENALTY, classes=classes), None)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[list(held_out)] = True
    scores: list[tuple[float, float, float]] = []
    probe: LinearProbe | None = None
    for penalty in sorted(penalties, reverse=True):
        # each starts where the last one ended; the problem is convex, so that only saves time
        probe = fit_probe(features[~held], labels[~held], penalty, classes=classes, start=probe)
        logits = probe.logits(features[held])
        right = float((logits.argmax(1) == labels[held]).double().mean())
        scores.append((right, -float(F.cross_entropy(logits, labels[held])), penalty))
    accuracy, _, penalty = max(scores)
    return ChosenProbe(fit_probe(features, labels, penalty, classes=classes), accuracy)


def fit_probe(
    features: Tensor,
    labels: Tensor,
    penalty: float,
    *,
    classes: int,
    start: LinearProbe | None = None,
    steps: int = 500,
) -> LinearProbe:
    """Fit multinomial logistic regression with L2, full batch, L-BFGS in float64.

    Minimises mean cross entropy + penalty / 2 * the sum of squared weights; the bias is free. The
    minimum is unique but for a common shift of the biases, so nothing is drawn at random.

    Args:
        features: ``(N, C)``.
        labels: ``(N,)`` int64 in [0, classes).
        penalty: positive.
        classes: number of classes.
        start: where to begin; at zero by default.
        steps: at most this many iterations.

    Raises:
        ValueError: the penalty is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"got a penalty of {penalty}, expected a positive one")
    wide = features.detach().double()
    mean = wide.mean(dim=0)
    scale = wide.std(dim=0, correction=0)
    flat = scale <= torch.finfo(torch.float32).eps * wide.abs().amax(dim=0)
    scale = torch.where(flat, 1.0, scale)
    standard = torch.where(flat, 0.0, (wide - mean) / scale)
    weight = start.weight.clone() if start else wide.new_zeros(classes, wide.shape[1])
    bias = start.bias.clone() if start else wide.new_zeros(classes)
    weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        tolerance_grad=1e-8,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standard, weight, bias), labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearProbe(mean, scale, weight.detach(), bias.detach(), penalty)
