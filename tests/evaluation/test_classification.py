from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosettle_adapter.analysis import ADAPTED, CENTRED, RAW_LAST, RAW_SAME
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.classification import LINEAR, classify, classify_features
from cosettle_adapter.evaluation.labelled_videos import LabelledVideo, split_videos
from cosettle_adapter.evaluation.pooling import PooledVideos, with_centred


def videos_of(count: dict[str, int]) -> list[LabelledVideo]:
    return [
        LabelledVideo(Path(f"{label}/{i}.mp4"), label, f"{label}/{i}.mp4")
        for label, number in count.items()
        for i in range(number)
    ]


def pooled(apart: float, *, offset: float = 0.0, each: int = 12) -> PooledVideos:
    """Three classes ``apart`` standard deviations from one another; adapted ones far apart."""
    videos = videos_of({"jump": each, "run": each, "walk": each})
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(each)
    centres = torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q.T[labels]
    noise = torch.randn(len(videos), 8, generator=generator)
    features = {
        RAW_LAST: noise + offset,
        RAW_SAME: apart * centres + noise + offset,
        ADAPTED: 9 * centres + noise,
    }
    return PooledVideos(tuple(videos), features, {"run/broken.mp4": "not a video"})


def test_classes_that_are_apart_are_told_apart_and_others_are_not() -> None:
    report = classify(pooled(9.0), ks=(1, 5))
    assert list(report.results) == [RAW_LAST, RAW_SAME, CENTRED, ADAPTED]
    for kind in (RAW_SAME, CENTRED, ADAPTED):
        assert list(report.results[kind]) == ["1-NN", "5-NN", LINEAR]
        assert all(result.accuracy == 1.0 for result in report.results[kind].values())
    for result in report.results[RAW_LAST].values():
        assert result.accuracy < 0.8
    assert report.skipped == {"run/broken.mp4": "not a video"}
    assert len(report.train) == 27


def test_centring_repairs_a_common_offset_for_neighbours() -> None:
    results = classify(pooled(3.0, offset=200.0), ks=(1,)).results
    assert results[CENTRED]["1-NN"].accuracy > results[RAW_SAME]["1-NN"].accuracy
    assert results[CENTRED][LINEAR] is results[RAW_SAME][LINEAR]


def test_accuracies_are_those_of_the_rows() -> None:
    result = classify(pooled(1.5), ks=(5,)).results[RAW_SAME]["5-NN"]
    right = [row.label == row.predicted for row in result.videos]
    assert 0 < sum(right) < len(right)
    assert result.accuracy == pytest.approx(sum(right) / len(right))
    shares = []
    for row in result.classes:
        own = [r for r, guess in zip(right, result.videos, strict=True) if guess.label == row.label]
        assert (row.videos, row.correct) == (len(own), sum(own))
        shares.append(sum(own) / len(own))
    assert result.mean_per_class == pytest.approx(sum(shares) / 3)
    assert result.settings == {"k": 5, "temperature": 0.07}


def test_neighbours_equal_a_reference_on_the_same_split() -> None:
    data = pooled(1.5)
    train, val = split_videos(data.videos)
    unit = torch.nn.functional.normalize(data.features[RAW_SAME], dim=1)
    expected = [data.videos[train[int((unit[train] @ unit[row]).argmax())]].label for row in val]
    result = classify(data, ks=(1,), linear=False).results[RAW_SAME]["1-NN"]
    assert [row.predicted for row in result.videos] == expected
    assert [row.name for row in result.videos] == [data.videos[row].name for row in val]


def test_the_same_seed_gives_the_same_result_and_another_another_split() -> None:
    data = pooled(1.5)
    assert classify(data) == classify(data)
    assert classify(data).train != classify(data, seed=1).train


def test_a_split_that_was_given_is_kept() -> None:
    data = pooled(9.0, each=3)
    parts = ["train", "train", "val"] * 3
    videos = tuple(
        LabelledVideo(v.path, v.label, v.name, part)  # type: ignore[arg-type]
        for v, part in zip(data.videos, parts, strict=True)
    )
    report = classify(PooledVideos(videos, data.features))
    guesses = report.results[ADAPTED]["1-NN"].videos
    assert [row.name for row in guesses] == ["jump/2.mp4", "run/2.mp4", "walk/2.mp4"]


def test_a_class_left_with_one_readable_video_is_an_error() -> None:
    data = PooledVideos(tuple(videos_of({"run": 2, "walk": 1})), {RAW_LAST: torch.randn(3, 4)})
    with pytest.raises(FrameError, match="single readable video of 'walk'"):
        classify(data)


def test_features_alone_are_enough() -> None:
    train, val = videos_of({"a": 2, "b": 2}), videos_of({"a": 1, "b": 1})
    corners = torch.eye(2)
    found = classify_features(corners[[0, 0, 1, 1]], train, corners, val, ks=(1,), linear=True)
    assert {method: result.accuracy for method, result in found.items()} == {
        "1-NN": 1.0, LINEAR: 1.0,
    }  # fmt: skip
    assert found[LINEAR].settings["chosen_at"] == 1.0


def test_centred_features_stand_between_raw_and_adapted() -> None:
    features = {RAW_LAST: torch.ones(2, 3), ADAPTED: torch.zeros(2, 3)}
    reference = {RAW_LAST: torch.full((4, 3), 5.0)}
    found = with_centred(features, reference)
    assert list(found) == [RAW_LAST, CENTRED, ADAPTED]
    assert bool((found[CENTRED] == -4).all())
    assert list(with_centred({"mine": torch.ones(1, 2)}, {})) == ["mine"]
