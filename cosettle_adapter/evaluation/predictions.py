"""Labels of videos and frames as their nearest neighbours among labelled features have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # of the neighbours' weights, as in DINO's kNN evaluation
_CHUNK = 1024  # queries compared at a time


@dataclass(frozen=True)
class Predictions:
    """What videos, or frames of videos, show and what they were taken for."""

    names: tuple[str, ...]  # of the videos, once for each label
    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    settings: Mapping[str, float | None] = field(default_factory=dict)  # of the method

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

    @property
    def mean_per_class(self) -> float:
        """Mean over labels, in [0, 1]."""
        return sum(self.per_class.values()) / len(self.per_class)


def nearest_votes(
    train: Tensor, labels: Tensor, queries: Tensor, *, ks: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Let the k nearest neighbours by cosine vote, as DINO's kNN evaluation does.

    Each of ``train`` ``(N, C)``, labelled in [0, classes), votes for its class with the weight
    exp(cosine / temperature) on each of ``queries`` ``(Q, C)``. Of equally near ones the earlier
    counts; where k is larger than N, all vote.

    Returns:
        k to votes ``(Q, classes)``, float64, each row summing to 1.

    Raises:
        ValueError: nothing to compare with, or a k below 1.
    """
    if not len(train) or not ks or min(ks) < 1:
        raise ValueError(
            f"got {len(train)} training features and ks={tuple(ks)}, expected at least one "
            "feature and ks of at least 1"
        )
    keys = F.normalize(train.double(), dim=1)
    votes = {k: keys.new_zeros(len(queries), classes) for k in ks}
    for start in range(0, len(queries), _CHUNK):
        part = F.normalize(queries[start : start + _CHUNK].double(), dim=1)
        cosine, order = (part @ keys.T).sort(dim=1, descending=True, stable=True)
        for k in ks:
            weights = torch.softmax(cosine[:, :k] / TEMPERATURE, dim=1)
            votes[k][start : start + _CHUNK].scatter_add_(1, labels[order[:, :k]], weights)
    return votes
