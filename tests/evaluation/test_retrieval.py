from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.classification import Retrieval, retrieve
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST
from cosettle_adapter.evaluation.videos import LabelledVideo, PooledVideos

from helpers import noise


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
