from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import classification
from cosettle_adapter.evaluation.classification import LINEAR, classify, linear_probe
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.evaluation.videos import (
    LabelledVideo,
    PooledVideos,
    nearest_votes,
    split_videos,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def votes_by_hand(train: list, labels: list, query: list, k: int) -> dict[int, float]:
    def cosine(a: list, b: list) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    nearest = sorted(range(len(train)), key=lambda i: -cosine(train[i], query))[:k]
    weights = {i: math.exp(cosine(train[i], query) / 0.07) for i in nearest}
    total = sum(weights.values())
    return {c: sum(w for i, w in weights.items() if labels[i] == c) / total for c in range(3)}


@given(n=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=40)
def test_votes_equal_their_definition(n: int, k: int, seed: int) -> None:
    train, queries = noise(n, 4, seed=seed), noise(3, 4, seed=seed + 100)
    labels = torch.arange(n) % 3
    votes = nearest_votes(train, labels, queries, ks=[k], classes=3)[k]
    for query, row in zip(queries.tolist(), votes.tolist(), strict=True):
        expected = votes_by_hand(train.tolist(), labels.tolist(), query, k)
        assert row == pytest.approx([expected[label] for label in range(3)])


def test_of_equally_near_neighbours_the_earlier_counts() -> None:
    labels, queries = torch.tensor([1, 0, 0, 0]), torch.ones(1, 3)
    votes = nearest_votes(torch.ones(4, 3), labels, queries, ks=[1, 3], classes=2)
    assert votes[1].argmax() == 1
    assert votes[3].tolist() == [pytest.approx([2 / 3, 1 / 3])]
    zeros = nearest_votes(noise(4, 3), labels * 0, 0 * queries, ks=[2], classes=1)
    assert zeros[2].tolist() == [[1.0]]
    for ks in ([], [0]):
        with pytest.raises(ValueError, match="expected at least one feature"):
            nearest_votes(noise(2, 3), labels[:2], queries, ks=ks, classes=2)


def blobs(classes: int, *, apart: float = 0.7) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat(12)
    return apart * noise(classes, 5, seed=9)[labels] + noise(len(labels), 5), labels


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_a_probe_minimises_its_objective(
    classes: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = blobs(classes)
    monkeypatch.setattr(classification, "_DEFAULT_PENALTY", penalty)
    logits, settings = linear_probe(features, labels, features, [])
    assert settings == {"penalty": penalty, "chosen_at": None}
    # mean cross entropy + penalty / 2 |W|^2, one weight vector a class, by Newton's method
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    design = torch.cat([standard, torch.ones(len(labels), 1)], dim=1).double()

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
    with torch.no_grad():
        assert torch.equal(linear_probe(features, labels, features, [])[0], plain)


def test_the_penalty_is_chosen_on_what_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 channels of noise and few videos: a weak penalty remembers them
    labels = torch.arange(2).repeat(12)
    signal = 0.8 * (labels[:, None] * 2.0 - 1) + noise(24, 1)
    features = torch.cat([signal, noise(24, 40, seed=3)], dim=1)
    held = list(range(12))
    logits, settings = linear_probe(features, labels, features, held)
    scores = {}
    for penalty in classification.PENALTIES:
        monkeypatch.setattr(classification, "_DEFAULT_PENALTY", penalty)
        judged, _ = linear_probe(features[12:], labels[12:], features[:12], [])
        right = float((judged.argmax(1) == labels[:12]).double().mean())
        scores[penalty] = (right, -float(F.cross_entropy(judged, labels[:12])))
    best = max(scores, key=lambda penalty: scores[penalty])
    assert settings == {"penalty": best, "chosen_at": scores[best][0]}
    monkeypatch.setattr(classification, "_DEFAULT_PENALTY", best)
    torch.testing.assert_close(logits, linear_probe(features, labels, features, [])[0])


def pooled(apart: float, *, offset: float = 0.0, each: int = 12) -> PooledVideos:
    """Three classes ``apart`` standard deviations from one another; adapted ones far apart."""
    videos = [
        LabelledVideo(Path(f"{label}/{i}.mp4"), label, f"{label}/{i}.mp4")
        for label in ("jump", "run", "walk")
        for i in range(each)
    ]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(each)
    centres = torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q.T[labels]
    around = torch.randn(len(videos), 8, generator=generator)
    features = {
        RAW_LAST: around + offset,
        RAW_SAME: apart * centres + around + offset,
        ADAPTED: 9 * centres + around,
    }
    return PooledVideos(tuple(videos), features, {})


def test_classes_that_are_apart_are_told_apart_and_others_are_not() -> None:
    results = classify(pooled(9.0), ks=(1, 5))
    assert list(results) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    for name in (RAW_SAME, CENTRED, ADAPTED):
        assert list(results[name]) == ["1-NN", "5-NN", LINEAR]
        assert all(found.accuracy == 1.0 for found in results[name].values())
    assert all(found.accuracy < 0.8 for found in results[RAW_LAST].values())
    assert results[ADAPTED]["5-NN"].settings == {"k": 5, "temperature": 0.07}


def test_centring_repairs_a_common_offset_for_neighbours() -> None:
    results = classify(pooled(3.0, offset=200.0), ks=(1,))
    assert results[CENTRED]["1-NN"].accuracy > results[RAW_SAME]["1-NN"].accuracy
    assert results[CENTRED][LINEAR] is results[RAW_SAME][LINEAR]


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
    shares = {}
    for label in ("jump", "run", "walk"):
        own = [hit for hit, truth in zip(right, found.labels, strict=True) if truth == label]
        assert found.counts[label] == (len(own), sum(own))
        shares[label] = sum(own) / len(own)
    assert found.per_class == shares
    assert found.mean_per_class == pytest.approx(sum(shares.values()) / 3)
    assert classify(data) == classify(data)
    assert classify(data, seed=1)[ADAPTED]["1-NN"].names != found.names


def test_a_given_split_is_kept_and_a_lonely_class_is_an_error() -> None:
    data = pooled(9.0, each=3)
    parts: Any = ["train", "train", "val"] * 3
    given = [dataclasses.replace(v, part=part) for v, part in zip(data.videos, parts, strict=True)]
    found = classify(data._replace(videos=tuple(given)))[ADAPTED]["1-NN"]
    assert list(found.names) == ["jump/2.mp4", "run/2.mp4", "walk/2.mp4"]
    with pytest.raises(FrameError, match="single readable video of 'walk'"):
        classify(data._replace(videos=data.videos[:7]))
    single = {name: values[:3] for name, values in data.features.items()}
    only = classify(PooledVideos(data.videos[:3], single, {}), ks=(1,))
    assert list(only[ADAPTED]) == ["1-NN"], "one class leaves nothing to probe"
