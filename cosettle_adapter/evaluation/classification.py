"""Does a video's pooled feature tell its class? Nearest neighbours and a linear probe.

Features are frozen and mean-pooled over patches and frames; every kind of them (raw, centred,
adapted) is judged on the same split, from one pass of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cosettle_adapter.analysis import CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.evaluation.labelled_videos import LabelledVideo, held_out, split_videos
from cosettle_adapter.evaluation.pooling import PooledVideos, with_centred
from cosettle_adapter.evaluation.probe import choose_probe, nearest_votes

LINEAR = "linear probe"
_CHOOSE_SHARE = 0.2  # of the training videos, to choose the linear probe's penalty by


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """How many videos of a class were recognised."""

    label: str
    videos: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share in [0, 1]."""
        return self.correct / self.videos


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a video was taken for."""

    name: str
    label: str
    predicted: str

    @property
    def correct(self) -> bool:
        """Whether that is its class."""
        return self.label == self.predicted


@dataclasses.dataclass(frozen=True)
class Classification:
    """One method on one kind of features.

    Attributes:
        method: ``5-NN``, ... or ``linear probe``.
        videos: a row for each video that was judged.
        settings: k and temperature, or the penalty and the accuracy it was chosen by.
    """

    method: str
    videos: tuple[Guess, ...]
    settings: Mapping[str, float | None]

    @property
    def accuracy(self) -> float:
        """Share of videos, in [0, 1]."""
        return sum(guess.correct for guess in self.videos) / len(self.videos)

    @property
    def classes(self) -> tuple[ClassScore, ...]:
        """A row for each class that was judged, in order of name."""
        count = Counter(guess.label for guess in self.videos)
        correct = Counter(guess.label for guess in self.videos if guess.correct)
        return tuple(ClassScore(label, count[label], correct[label]) for label in sorted(count))

    @property
    def mean_per_class(self) -> float:
        """Mean over classes of their accuracy, in [0, 1]."""
        rows = self.classes
        return sum(row.accuracy for row in rows) / len(rows)


@dataclasses.dataclass(frozen=True)
class ClassificationReport:
    """Every method on every kind of features.

    Attributes:
        results: kind of features to method to result.
        train: names of the videos that were learnt from.
        skipped: name to why, of videos that could not be read.
    """

    results: Mapping[str, Mapping[str, Classification]]
    train: tuple[str, ...]
    skipped: Mapping[str, str]


def classify(
    pooled: PooledVideos,
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    temperature: float = 0.07,
    linear: bool = True,
    validation: float = 0.25,
    seed: int = 0,
) -> ClassificationReport:
    """Classify videos by every kind of their pooled features.

    Args:
        pooled: see :func:`~cosettle_adapter.evaluation.pooling.pool_videos`.
        ks: numbers of neighbours; all training videos where a number is larger.
        temperature: of the neighbours' weights.
        linear: fit linear probes as well.
        validation: share of each class that is judged, where no split was given.
        seed: of the split, and of the training videos that choose the penalty.

    Returns:
        Results for raw, centred (minus the mean of the training videos) and adapted features. A
        linear probe standardises, so centring changes nothing for it.

    Raises:
        FrameError: a class with a single readable video, or a split that lacks a part.
        ValueError: an option out of range.
    """
    videos = pooled.videos
    train, val = split_videos(videos, validation=validation, seed=seed)
    reference = {name: values[train] for name, values in pooled.features.items()}
    features = with_centred(pooled.features, reference)
    results: dict[str, dict[str, Classification]] = {}
    for name, values in features.items():
        results[name] = classify_features(
            values[train],
            [videos[row] for row in train],
            values[val],
            [videos[row] for row in val],
            ks=ks,
            temperature=temperature,
            linear=linear and name != CENTRED,
            seed=seed,
        )
    if linear and CENTRED in results:
        same = RAW_SAME if RAW_SAME in results else RAW_LAST
        results[CENTRED][LINEAR] = results[same][LINEAR]
    return ClassificationReport(
        results, tuple(videos[row].name for row in train), dict(pooled.skipped)
    )


def classify_features(
    train: Tensor,
    train_videos: Sequence[LabelledVideo],
    val: Tensor,
    val_videos: Sequence[LabelledVideo],
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    temperature: float = 0.07,
    linear: bool = True,
    seed: int = 0,
) -> dict[str, Classification]:
    """Classify videos by one kind of features.

    Args:
        train: ``(N, C)`` features to learn from.
        train_videos: their videos.
        val: ``(M, C)`` features to judge.
        val_videos: their videos, of no other classes.
        ks: as in :func:`classify`, like the other options.
        temperature: of the neighbours' weights.
        linear: fit a linear probe as well.
        seed: of the training videos that choose its penalty.

    Returns:
        Method to result.
    """
    classes = sorted({video.label for video in train_videos})
    number = {label: index for index, label in enumerate(classes)}
    labels = torch.tensor([number[video.label] for video in train_videos])
    found: dict[str, Classification] = {}

    def judge(method: str, scores: Tensor, settings: Mapping[str, float | None]) -> None:
        guesses = tuple(
            Guess(video.name, video.label, classes[index])
            for video, index in zip(val_videos, scores.argmax(dim=1).tolist(), strict=True)
        )
        found[method] = Classification(method, guesses, settings)

    votes = nearest_votes(train, labels, val, ks=ks, classes=len(classes), temperature=temperature)
    for k, tally in votes.items():
        judge(f"{k}-NN", tally, {"k": k, "temperature": temperature})
    if linear:
        names = [video.name for video in train_videos]
        train_labels = [video.label for video in train_videos]
        held = held_out(names, train_labels, share=_CHOOSE_SHARE, seed=seed)
        chosen = choose_probe(train, labels, held, classes=len(classes))
        settings = {"penalty": chosen.probe.penalty, "chosen_at": chosen.held_out_accuracy}
        judge(LINEAR, chosen.probe.logits(val), settings)
    return found
