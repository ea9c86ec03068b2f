from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import retrieval
from cosettle_adapter.evaluation.retrieval import Retrieval, retrieve
from cosettle_adapter.evaluation.variants import ADAPTED, CENTRED, RAW_LAST
from cosettle_adapter.evaluation.videos import LabelledVideo, Part, PooledVideos


def videos_of(labels: str, part: Part | None = None) -> list[LabelledVideo]:
    return [
        LabelledVideo(Path(f"{i}.mp4"), label, f"{part}/{i}.mp4", part)
        for i, label in enumerate(labels)
    ]


def search(features: Tensor, labels: str, **options: tuple[int, ...]) -> Retrieval:
    pooled = PooledVideos(tuple(videos_of(labels)), {ADAPTED: features}, {})
    return retrieve(pooled, **options)[ADAPTED]


def by_hand(features: Tensor, labels: str, ks: tuple[int, ...]) -> tuple[dict, float]:
    """R@k and mAP of every video searching all others."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    hits, precisions = {k: [] for k in ks}, []
    for i in range(len(labels)):
        others = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -unit[i] @ unit[j])
        right = [labels[j] == labels[i] for j in others]
        if not any(right):
            continue
        for k in ks:
            hits[k].append(any(right[:k]))
        found = [rank for rank, hit in enumerate(right, start=1) if hit]
        precisions.append(sum(sum(right[:rank]) / rank for rank in found) / len(found))
    return {k: sum(row) / len(row) for k, row in hits.items()}, sum(precisions) / len(precisions)


@given(labels=st.text("abc", min_size=4, max_size=14), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=40)
def test_figures_equal_their_definitions(labels: str, seed: int) -> None:
    features = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed))
    if all(labels.count(label) == 1 for label in labels):
        return
    found = search(features, labels, ks=(1, 2, 5))
    recall, precision = by_hand(features, labels, (1, 2, 5))
    assert found.recall == pytest.approx(recall)
    assert found.mean_average_precision == pytest.approx(precision)
    alone = [f"None/{i}.mp4" for i, label in enumerate(labels) if labels.count(label) == 1]
    assert list(found.alone) == alone
    assert len(found.queries) == len(labels) - len(alone)


def test_a_query_never_finds_itself_and_chunks_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = torch.eye(4)
    features[1, 0] = 0.9
    found = search(features, "abab")
    assert found.queries[0].nearest == "None/1.mp4"  # of the other class, but nearer
    assert found.queries[0].first_hit == 2
    assert found.recall == {1: 0.25, 5: 1.0, 10: 1.0}
    monkeypatch.setattr(retrieval, "_CHUNK", 3)
    assert search(features, "abab") == found


def test_of_equally_near_videos_the_earlier_comes_first() -> None:
    found = search(torch.ones(5, 2), "abbaa")
    assert [query.nearest for query in found.queries[:2]] == ["None/1.mp4", "None/0.mp4"]
    # the first finds b, b, a, a
    assert found.queries[0].average_precision == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_every_variant_is_searched_and_a_given_split_is_kept() -> None:
    videos = (*videos_of("aabb", "train"), *videos_of("ab", "val"))
    plain = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05], [0.05, 1]])
    results = retrieve(PooledVideos(videos, {RAW_LAST: plain + 1000, ADAPTED: plain}, {}))
    assert list(results) == [RAW_LAST, CENTRED, ADAPTED]
    for variant in (CENTRED, ADAPTED):
        found = results[variant]
        assert found.searched == 4
        assert [query.name for query in found.queries] == ["val/0.mp4", "val/1.mp4"]
        assert found.mean_average_precision == 1.0
        assert found.per_class == {"a": 1.0, "b": 1.0}


def test_nothing_to_find_is_an_error() -> None:
    with pytest.raises(FrameError, match="no query has another video of its class to find"):
        search(torch.randn(3, 2), "abc")
    with pytest.raises(ValueError, match=r"ks=\(0,\)"):
        search(torch.randn(3, 2), "aab", ks=(0,))
