from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.labelled_videos import (
    LabelledVideo,
    labelled_videos,
    split_videos,
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def named(count: dict[str, int]) -> list[LabelledVideo]:
    return [
        LabelledVideo(Path(f"{label}/{i}.mp4"), label, f"{label}/{i}.mp4")
        for label, videos in count.items()
        for i in range(videos)
    ]


def test_a_class_is_a_folder_and_a_video_a_file_or_a_folder_of_images(tmp_path: Path) -> None:
    touch(
        tmp_path, "run/b.mp4", "run/a.AVI", "run/notes.txt", "run/._b.mp4", "jump/clip/0001.jpg",
        "jump/clip/0002.jpg", "jump/empty/readme.md", ".cache/x/y.mp4", "list.csv",
    )  # fmt: skip
    found = labelled_videos(tmp_path)
    assert [(video.name, video.label, video.part) for video in found] == [
        ("jump/clip", "jump", None),
        ("run/a.AVI", "run", None),
        ("run/b.mp4", "run", None),
    ]
    assert found[0].path == tmp_path / "jump" / "clip"
    assert str(found[0]) == "jump/clip"


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4")
    found = labelled_videos(tmp_path)
    assert [(v.name, v.part) for v in found] == [
        ("train/a/1.mp4", "train"), ("train/b/2.mp4", "train"), ("val/a/3.mp4", "val"),
    ]  # fmt: skip
    assert split_videos(found) == ([0, 1], [2])


def test_train_and_val_among_others_are_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "val/2.mp4", "plane/3.mp4")
    assert {video.label for video in labelled_videos(tmp_path)} == {"train", "val", "plane"}


def test_wrong_folders_are_described(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="nowhere is not a folder; expected nowhere/<class>/"):
        labelled_videos(tmp_path / "nowhere")
    with pytest.raises(FrameError, match="has no folders; expected one for each class"):
        labelled_videos(tmp_path)
    touch(tmp_path, "run/a.mp4", "jump/readme.txt")
    with pytest.raises(FrameError, match="jump holds no videos: expected video files"):
        labelled_videos(tmp_path)


def test_classes_of_val_must_be_in_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "val/a/2.mp4", "val/b/3.mp4")
    with pytest.raises(FrameError, match=r"has classes that .*train lacks: 'b'; give both"):
        labelled_videos(tmp_path)


@given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    validation=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_every_class_is_on_both_sides_by_its_share(
    counts: list[int], validation: float, seed: int
) -> None:
    videos = named({f"c{i}": count for i, count in enumerate(counts)})
    train, val = split_videos(videos, validation=validation, seed=seed)
    assert sorted(train + val) == list(range(len(videos)))
    judged = Counter(videos[row].label for row in val)
    for i, count in enumerate(counts):
        assert 1 <= judged[f"c{i}"] <= count - 1
        assert abs(judged[f"c{i}"] - validation * count) <= 1


@given(order=st.permutations(range(11)), seed=st.integers(0, 5))
def test_a_split_depends_on_names_and_seed_alone(order: list[int], seed: int) -> None:
    videos = named({"a": 7, "b": 4})
    shuffled = [videos[i] for i in order]
    expected = {videos[row].name for row in split_videos(videos, seed=seed).val}
    assert {shuffled[row].name for row in split_videos(shuffled, seed=seed).val} == expected


def test_a_missing_video_moves_few_others() -> None:
    videos = named({"a": 40, "b": 40})
    whole = {videos[row].name for row in split_videos(videos).val}
    fewer = videos[1:]
    rest = {fewer[row].name for row in split_videos(fewer).val}
    assert len(whole ^ rest) <= 2
    assert len(whole ^ {videos[row].name for row in split_videos(videos, seed=1).val}) > 2


def test_a_class_with_one_video_is_named() -> None:
    with pytest.raises(FrameError, match="single readable video of 'b', 'c', expected at least 2"):
        split_videos(named({"a": 3, "b": 1, "c": 1}))
    many = {f"c{i}": 1 for i in range(9)}
    with pytest.raises(FrameError, match="'c4' and 4 more"):
        split_videos(named(many))


def test_a_given_split_needs_both_parts_and_the_same_classes() -> None:
    train = [LabelledVideo(Path("1"), "a", "1", "train")]
    with pytest.raises(FrameError, match="got 1 videos to train on and 0 to validate"):
        split_videos(train)
    with pytest.raises(FrameError, match="none to train on of 'b'"):
        split_videos([*train, LabelledVideo(Path("2"), "b", "2", "val")])
    with pytest.raises(ValueError, match=r"validation=1\.0"):
        split_videos(train, validation=1.0)
