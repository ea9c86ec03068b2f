from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import classification
from cosettle_adapter.evaluation.classification import (
    LINEAR,
    Retrieval,
    classify,
    linear_probe,
    nearest_votes,
    retrieve,
    split_videos,
)
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.evaluation.videos import LabelledVideo, PooledVideos

from helpers import noise

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


@given(n=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=40)
def test_votes_equal_their_definition(n: int, k: int, seed: int) -> None:
    train, queries = noise(n, 4, seed=seed).double(), noise(3, 4, seed=seed + 100).double()
    labels = torch.arange(n) % 3
    votes = nearest_votes(train, labels, queries, ks=[k], classes=3)[k]
    for query, row in zip(queries, votes.tolist(), strict=True):
        cosine = F.cosine_similarity(train, query[None]).tolist()
        nearest = sorted(range(n), key=lambda i: -cosine[i])[:k]
        weights = {i: math.exp(cosine[i] / 0.07) for i in nearest}
        for label, found in enumerate(row):
            own = sum(weight for i, weight in weights.items() if labels[i] == label)
            assert found == pytest.approx(own / sum(weights.values()))


def test_of_equally_near_neighbours_the_earlier_counts() -> None:
    labels, queries = torch.tensor([1, 0, 0, 0]), torch.ones(1, 3)
    votes = nearest_votes(torch.ones(4, 3), labels, queries, ks=[1, 3], classes=2)
    assert votes[1].argmax() == 1
    assert votes[3].tolist() == [pytest.approx([2 / 3, 1 / 3])]
    for ks in ([], [0]):
        with pytest.raises(ValueError, match="at least 1"):
            nearest_votes(noise(2, 3), labels[:2], queries, ks=ks, classes=2)


def blobs(classes: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat(12)
    return (0.7 * noise(classes, 5, seed=9)[labels] + noise(len(labels), 5)).double(), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_a_probe_minimises_its_objective(
    classes: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = blobs(classes)
    monkeypatch.setattr(classification, "_DEFAULT_PENALTY", penalty)
    logits, settings = linear_probe(features, labels, features, [])
    assert settings == penalty
    # mean cross entropy + penalty / 2 |W|^2, one weight vector a class, by Newton's method
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    design = torch.cat([standard, torch.ones(len(labels), 1)], dim=1)

    def objective(flat: Tensor) -> Tensor:
        weights = flat.reshape(6, classes)
        return F.cross_entropy(design @ weights, labels) + penalty / 2 * weights[:5].square().sum()

    flat = torch.zeros(6 * classes, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(objective)(flat)
        hessian = torch.func.hessian(objective)(flat) + 1e-9 * torch.eye(len(flat))
        flat = flat - torch.linalg.solve(hessian, gradient)
    expected = torch.softmax(design @ flat.reshape(6, classes), dim=1)
    torch.testing.assert_close(torch.softmax(logits, 1), expected, atol=1e-5, rtol=0)


def test_a_probe_does_not_depend_on_scale_shift_and_constant_channels() -> None:
    features, labels = blobs(3)
    plain, _ = linear_probe(features, labels, features, [])
    rounding = torch.full((len(labels), 1), 0.1) + 1e-9 * noise(len(labels), 1)
    moved = torch.cat([features * 1e3 - 7, rounding], dim=1)
    found, _ = linear_probe(moved, labels, moved, [])
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_chosen_on_what_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 channels of noise and few videos: a weak penalty remembers them
    labels = torch.arange(2).repeat(12)
    signal = 0.8 * (labels[:, None] * 2.0 - 1) + noise(24, 1)
    features = torch.cat([signal, noise(24, 40, seed=3)], dim=1)
    logits, settings = linear_probe(features, labels, features, list(range(12)))
    scores = {}
    for penalty in classification.PENALTIES:
        monkeypatch.setattr(classification, "_DEFAULT_PENALTY", penalty)
        judged, _ = linear_probe(features[12:], labels[12:], features[:12], [])
        right = float((judged.argmax(1) == labels[:12]).double().mean())
        scores[penalty] = (right, -float(F.cross_entropy(judged, labels[:12])))
    best = max(scores, key=lambda penalty: scores[penalty])
    assert settings == best
    monkeypatch.setattr(classification, "_DEFAULT_PENALTY", best)
    torch.testing.assert_close(logits, linear_probe(features, labels, features, [])[0])


def pooled(apart: float, *, offset: float = 0.0, each: int = 12) -> PooledVideos:
    """Three classes ``apart`` standard deviations from one another; adapted ones far apart."""
    names = [f"{label}/{i}.mp4" for label in ("jump", "run", "walk") for i in range(each)]
    videos = tuple(LabelledVideo(Path(name), name.split("/")[0], name) for name in names)
    centres = torch.linalg.qr(noise(8, 3)).Q.T[torch.arange(3).repeat_interleave(each)]
    around = noise(len(videos), 8, seed=5)
    same = apart * centres + around + offset
    features = {RAW_LAST: around + offset, RAW_SAME: same, ADAPTED: 9 * centres + around}
    return PooledVideos(videos, features, {})


def test_classes_that_are_apart_are_told_apart_and_others_are_not() -> None:
    results = classify(pooled(9.0), ks=(1, 5))
    assert list(results) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    for name in (RAW_SAME, CENTRED, ADAPTED):
        assert list(results[name]) == ["1-NN", "5-NN", LINEAR]
        assert all(found.accuracy == 1.0 for found in results[name].values())
    assert all(found.accuracy < 0.8 for found in results[RAW_LAST].values())


def test_centring_takes_a_common_offset_away_from_neighbours() -> None:
    plain, moved = classify(pooled(1.0), ks=(1,)), classify(pooled(1.0, offset=200.0), ks=(1,))
    assert moved[RAW_SAME]["1-NN"].predicted != plain[RAW_SAME]["1-NN"].predicted
    assert moved[CENTRED]["1-NN"].predicted == plain[CENTRED]["1-NN"].predicted
    assert moved[CENTRED][LINEAR] is moved[RAW_SAME][LINEAR]


def test_neighbours_and_figures_equal_a_reference_on_the_same_split() -> None:
    data = pooled(1.5)
    train, val = split_videos(data.videos)
    unit = F.normalize(data.features[RAW_SAME], dim=1)
    expected = [data.videos[train[int((unit[train] @ unit[row]).argmax())]].label for row in val]
    found = classify(data, ks=(1,))[RAW_SAME]["1-NN"]
    assert list(found.predicted) == expected
    assert list(found.names) == [data.videos[row].name for row in val]
    right = [a == b for a, b in zip(found.labels, expected, strict=True)]
    assert 0 < sum(right) < len(right)
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    assert classify(data) == classify(data)
    assert classify(data, seed=1)[ADAPTED]["1-NN"].names != found.names


def test_a_given_split_is_kept_and_a_lonely_class_is_an_error() -> None:
    data = pooled(9.0, each=3)
    parts: Any = ["train", "train", "val"] * 3
    given = [v._replace(part=part) for v, part in zip(data.videos, parts, strict=True)]
    found = classify(data._replace(videos=tuple(given)))[ADAPTED]["1-NN"]
    assert list(found.names) == ["jump/2.mp4", "run/2.mp4", "walk/2.mp4"]
    with pytest.raises(FrameError, match="single readable video of 'walk'"):
        classify(data._replace(videos=data.videos[:7]))
    single = {name: values[:3] for name, values in data.features.items()}
    only = classify(PooledVideos(data.videos[:3], single, {}), ks=(1,))
    assert list(only[ADAPTED]) == ["1-NN"], "one class leaves nothing to probe"


def videos_of(labels: str, part: str | None = None) -> tuple[LabelledVideo, ...]:
    names = [f"{part}/{i}.mp4" for i in range(len(labels))]
    made = zip(names, labels, strict=True)
    return tuple(LabelledVideo(name, label, name, part) for name, label in made)  # type: ignore[arg-type]


def search(features: Tensor, labels: str, **options: tuple[int, ...]) -> Retrieval:
    return retrieve(PooledVideos(videos_of(labels), {ADAPTED: features}, {}), **options)[ADAPTED]


@given(labels=st.text("abc", min_size=4, max_size=14), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=40)
def test_figures_equal_their_definitions(labels: str, seed: int) -> None:
    assume(any(labels.count(label) > 1 for label in labels))
    features, ks = noise(len(labels), 3, seed=seed), (1, 2, 5)
    found = search(features, labels, ks=ks)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    hits, precisions = {k: [] for k in ks}, []
    for i in range(len(labels)):
        others = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -unit[i] @ unit[j])
        right = [labels[j] == labels[i] for j in others]
        if any(right):
            for k in ks:
                hits[k].append(any(right[:k]))
            ranks = [rank for rank, hit in enumerate(right, start=1) if hit]
            precisions.append(sum(sum(right[:rank]) / rank for rank in ranks) / len(ranks))
    count = len(precisions)
    assert found.figures["mAP"] == pytest.approx(sum(precisions) / count)
    del found.figures["mAP"]
    assert found.figures == pytest.approx({f"R@{k}": sum(row) / count for k, row in hits.items()})
    counted = [f"None/{i}.mp4" for i, label in enumerate(labels) if labels.count(label) > 1]
    assert list(found.queries) == counted, "those without another of their class do not count"


def test_a_query_never_finds_itself_and_of_equally_near_videos_the_earlier_comes_first() -> None:
    features = torch.eye(4)
    features[1, 0] = 0.9  # of the other class than the first, but nearest
    assert search(features, "abab").figures["R@1"] == 0.25
    # all equally near: each a finds b, b, a, a or its like, and each b finds a, b, a, a
    found = search(torch.ones(5, 2), "abbaa")
    assert found.figures["R@1"] == pytest.approx(2 / 5)
    first, later = (1 / 3 + 2 / 4) / 2, (1 / 1 + 2 / 4) / 2
    assert found.per_class == pytest.approx({"a": (first + 2 * later) / 3, "b": 1 / 2})


def test_every_variant_is_searched_and_a_given_split_is_kept() -> None:
    videos = (*videos_of("aabb", "train"), *videos_of("ab", "val"))
    plain = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05], [0.05, 1]])
    results = retrieve(PooledVideos(videos, {RAW_LAST: plain + 1000, ADAPTED: plain}, {}))
    assert list(results) == [RAW_LAST, CENTRED, ADAPTED]
    for variant in (CENTRED, ADAPTED):
        found = results[variant]
        assert found.searched == 4
        assert found.queries == ("val/0.mp4", "val/1.mp4")
        assert found.figures["mAP"] == 1.0
        assert found.per_class == {"a": 1.0, "b": 1.0}


def test_nothing_to_find_is_an_error() -> None:
    with pytest.raises(FrameError, match="no query has another video of its class to find"):
        search(noise(3, 2), "abc")
    with pytest.raises(ValueError, match=r"ks=\(0,\)"):
        search(noise(3, 2), "aab", ks=(0,))
