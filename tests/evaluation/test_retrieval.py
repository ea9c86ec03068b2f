from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cosettle_adapter.analysis import ADAPTED, CENTRED, RAW_LAST
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import retrieval
from cosettle_adapter.evaluation.labelled_videos import LabelledVideo, Part
from cosettle_adapter.evaluation.pooling import PooledVideos
from cosettle_adapter.evaluation.retrieval import retrieve, retrieve_features


def videos_of(labels: str, part: Part | None = None) -> list[LabelledVideo]:
    return [
        LabelledVideo(Path(f"{i}.mp4"), label, f"{part}/{i}.mp4", part)
        for i, label in enumerate(labels)
    ]


def by_hand(features: torch.Tensor, labels: str, ks: tuple[int, ...]) -> tuple[dict, float]:
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
    videos = videos_of(labels)
    if all(labels.count(label) == 1 for label in labels):
        return
    found = retrieve_features(features, videos, features, videos, ks=(1, 2, 5))
    recall, precision = by_hand(features, labels, (1, 2, 5))
    assert found.recall == pytest.approx(recall)
    assert found.mean_average_precision == pytest.approx(precision)
    alone = [v.name for v in videos if labels.count(v.label) == 1]
    assert list(found.alone) == alone
    assert len(found.queries) == len(labels) - len(alone)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = "aabbccabc"
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    whole = retrieve_features(features, videos_of(labels), features, videos_of(labels))
    monkeypatch.setattr(retrieval, "_CHUNK", 2)
    assert retrieve_features(features, videos_of(labels), features, videos_of(labels)) == whole


def test_a_query_never_finds_itself() -> None:
    features = torch.eye(4)
    features[1, 0] = 0.9
    found = retrieve_features(features, videos_of("abab"), features, videos_of("abab"))
    assert found.queries[0].nearest == "None/1.mp4"  # of the other class, but nearer
    assert found.queries[0].first_hit == 2
    assert found.recall == {1: 0.25, 5: 1.0, 10: 1.0}


def test_classes_that_are_apart_are_found_whole() -> None:
    labels = "aaabbbccc"
    centres = torch.eye(3).repeat_interleave(3, dim=0)
    features = centres + 0.01 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    found = retrieve_features(features, videos_of(labels), features, videos_of(labels))
    assert found.recall == {1: 1.0, 5: 1.0, 10: 1.0}
    assert found.mean_average_precision == 1.0
    assert found.per_class == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_every_kind_is_searched_and_a_given_split_is_kept() -> None:
    videos = (*videos_of("aabb", "train"), *videos_of("ab", "val"))
    plain = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05], [0.05, 1]])
    features = {RAW_LAST: plain + 1000, ADAPTED: plain}
    report = retrieve(PooledVideos(videos, features, {"x": "broken"}))
    assert list(report.results) == [RAW_LAST, CENTRED, ADAPTED]
    assert report.gallery == 4
    assert report.skipped == {"x": "broken"}
    assert [query.name for query in report.results[ADAPTED].queries] == ["val/0.mp4", "val/1.mp4"]
    assert report.results[ADAPTED].mean_average_precision == 1.0
    assert report.results[CENTRED].mean_average_precision == 1.0


def test_nothing_to_find_is_an_error() -> None:
    features = torch.randn(3, 2)
    with pytest.raises(FrameError, match="no query has another video of its class to find"):
        retrieve_features(features, videos_of("abc"), features, videos_of("abc"))
    with pytest.raises(ValueError, match=r"ks=\(0,\)"):
        retrieve_features(features, videos_of("aab"), features, videos_of("aab"), ks=(0,))
