from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.correspondence import temporal_fusion
from cosettle_adapter.correspondence.fusion import FusionMode
from cosettle_adapter.errors import BackboneMismatchError, FrameError, MissingExtraError
from cosettle_adapter.evaluation import variants
from cosettle_adapter.evaluation import videos as videos_module
from cosettle_adapter.evaluation.classification import classify, split_videos
from cosettle_adapter.evaluation.variants import (
    ADAPTED,
    CENTRED,
    RAW_LAST,
    RAW_SAME,
    compare_features,
    feature_variants,
)
from cosettle_adapter.evaluation.videos import LabelledVideo, frames_of, labelled_videos
from cosettle_adapter.video import FrameSelection, SourceInfo, open_frames
from cosettle_adapter.video.files import VIDEO_SUFFIXES

from helpers import projection_for, write_video


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
        tmp_path, "run/b.mp4", "run/a.AVI", "run/notes.txt", "run/._b.mp4", "jump/clip/0001.JPG",
        "jump/clip/0002.jpg", "jump/empty/readme.md", "jump/.clip/1.png", ".cache/x/y.mp4",
    )  # fmt: skip
    found = labelled_videos(tmp_path)
    assert [(video.name, video.label, video.part) for video in found] == [
        ("jump/clip", "jump", None),
        ("run/a.AVI", "run", None),
        ("run/b.mp4", "run", None),
    ]
    assert found[0].path == tmp_path / "jump" / "clip"
    touch(tmp_path, *(f"all/video{suffix}" for suffix in VIDEO_SUFFIXES))
    assert len(labelled_videos(tmp_path)) == len(found) + len(VIDEO_SUFFIXES)


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4")
    found = labelled_videos(tmp_path)
    assert [(v.name, v.part) for v in found] == [
        ("train/a/1.mp4", "train"), ("train/b/2.mp4", "train"), ("val/a/3.mp4", "val"),
    ]  # fmt: skip
    assert split_videos(found) == ([0, 1], [2])
    with pytest.raises(FrameError, match="got 2 videos to train on and 0 to test on"):
        split_videos(found[:2])
    with pytest.raises(FrameError, match="no readable training video of 'a'"):
        split_videos(found[1:])
    touch(tmp_path, "plane/3.mp4", "train/1.mp4", "val/1.mp4")  # among others they are classes
    assert {video.label for video in labelled_videos(tmp_path)} == {"train", "val", "plane"}


def test_wrong_folders_are_described(tmp_path: Path) -> None:
    touch(tmp_path / "a", "run/a.mp4", "jump/readme.txt")
    for folder, message in (
        ("nowhere", "nowhere does not exist, expected a folder of <class>/"),
        ("a/jump", "has no folders; expected one for each class"),
        ("a", "jump holds no videos: expected video files"),
    ):
        with pytest.raises(FrameError, match=message):
            labelled_videos(tmp_path / folder)
    with pytest.raises(FrameError, match=r"single readable video of 'c0', .*'c8'; expected both"):
        split_videos(named({f"c{i}": 1 for i in range(9)} | {"more": 2}))


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_a_split_takes_a_quarter_of_each_class_by_name_and_seed_alone(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    videos = named({f"c{i}": count for i, count in enumerate(counts)})
    train, val = split_videos(videos, seed=seed)
    assert sorted(train + val) == list(range(len(videos)))
    judged = Counter(videos[row].label for row in val)
    for i, count in enumerate(counts):
        assert 1 <= judged[f"c{i}"] <= count - 1
        assert abs(judged[f"c{i}"] - count / 4) <= 1
    shuffled = data.draw(st.permutations(videos))
    expected = {videos[row].name for row in val}
    assert {shuffled[row].name for row in split_videos(shuffled, seed=seed)[1]} == expected
    more = [*videos, *named({"c0": counts[0] + 1})[-1:]]  # one more moves few others
    assert len(expected ^ {more[row].name for row in split_videos(more, seed=seed)[1]}) <= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three clips: plain ones and noisy ones."""
    root = tmp_path_factory.mktemp("classes")
    for label, noisy in (("plain", False), ("noisy", True)):
        (root / label).mkdir()
        for index, width in enumerate((64, 96, 80)):
            name = root / label / f"{index}.mp4"
            write_video(name, frames=9, height=48, width=width, noisy=noisy)
    return root


def test_a_video_is_the_mean_of_its_patches_and_frames(
    tiny_adapter: CoSettleAdapter, folder: Path
) -> None:
    done: list[tuple[int, int]] = []
    videos = labelled_videos(folder)
    pooled = videos_module.pool_videos(
        tiny_adapter, videos, frames=4, size=48, batch_size=3,
        on_video=lambda *progress: done.append(progress),
    )  # fmt: skip
    assert pooled.videos == tuple(videos)
    assert done == [(i, 6) for i in range(1, 7)]
    assert list(pooled.features) == [RAW_LAST, RAW_SAME, ADAPTED]
    for row, video in enumerate(videos[:3]):
        chunks = open_frames(video.path, FrameSelection(every=2, max_frames=4))
        maps = compare_features(tiny_adapter, torch.cat([c.frames for c in chunks]), size=48)
        for name, values in pooled.features.items():
            torch.testing.assert_close(values[row], maps[name].mean((0, 2, 3)))
    assert all(row["1-NN"].accuracy == 1.0 for row in classify(pooled, ks=(1,)).values())


def test_videos_are_encoded_at_a_rate_and_broken_ones_listed(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=20, height=48, width=64)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    paths = {name: tmp_path / name for name in ("a.mp4", "broken.mp4", "gone.mp4")}
    done: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        videos, skipped = videos_module.encode_videos(
            tiny_adapter, paths, rate=12.5, size=48,
            on_video=lambda *progress: done.append(progress),
        )  # fmt: skip
    assert [video.video for video in videos] == ["a.mp4"]
    torch.testing.assert_close(videos[0].times, torch.arange(10).double() * 0.08)
    chunks = open_frames(path, FrameSelection(every=2))
    maps = compare_features(tiny_adapter, torch.cat([c.frames for c in chunks]), size=48)
    torch.testing.assert_close(videos[0].features[ADAPTED], maps[ADAPTED].mean((2, 3)))
    assert list(skipped) == ["broken.mp4", "gone.mp4"]
    assert "does not exist" in skipped["gone.mp4"]
    assert "skipped broken.mp4" in caplog.text
    assert done == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(FrameError, match=r"none of 1 videos could be read.*gone\.mp4"):
        videos_module.encode_videos(tiny_adapter, {"gone.mp4": tmp_path / "gone.mp4"})


def test_what_fails_for_every_video_is_not_blamed_on_each() -> None:
    def read(item: str) -> str:
        raise MissingExtraError(f"{item} needs the package 'av'")

    with pytest.raises(MissingExtraError, match="needs the package"):
        videos_module.each_readable(["a", "b"], read, lambda *_: None)
    with pytest.raises(FrameError, match="got no videos to read"):
        videos_module.each_readable([], read, lambda *_: None)


def test_frames_are_spread_or_taken_at_a_rate(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "plain" / "0.mp4"  # 9 frames at 25 a second
    spread = [frames_of(path, frames=n) for n in (1, 2, 4, 9, 20)]
    assert [select.every for select in spread] == [9, 4, 2, 1, 1]
    assert [select.max_frames for select in spread] == [1, 2, 4, 9, 20]
    rates = [frames_of(path, rate=rate).every for rate in (1.0, 4.0, 25.0, 100.0)]
    assert rates == [25, 6, 1, 1]
    monkeypatch.setattr(videos_module, "probe", lambda _: SourceInfo(frames=None, fps=None))
    assert frames_of(Path("images"), frames=4).every == frames_of(Path("images"), rate=4.0).every
    for wrong in ({"frames": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="expected both above 0"):
            frames_of(path, **wrong)  # type: ignore[arg-type]


def test_centred_features_stand_between_raw_and_adapted() -> None:
    features = {RAW_LAST: torch.ones(2, 3), ADAPTED: torch.zeros(2, 3)}
    found = videos_module.with_centred(features, {RAW_LAST: torch.full((4, 3), 5.0)})
    assert list(found) == [RAW_LAST, CENTRED, ADAPTED]
    assert bool((found[CENTRED] == -4).all())
    assert list(videos_module.with_centred({"mine": torch.ones(1, 2)}, {})) == ["mine"]


FRAMES = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8, generator=torch.manual_seed(0))


def centred(features: Tensor) -> Tensor:
    return features - features.mean((0, 2, 3), keepdim=True)


def test_variants_are_what_the_parts_give(tiny_adapter: CoSettleAdapter) -> None:
    done: list[int] = []
    found = compare_features(tiny_adapter, FRAMES, batch_size=2, on_frames=done.append)
    assert done == [2, 4, 5]
    raw, adapted = tiny_adapter(FRAMES, return_backbone=True)
    last = tiny_adapter.backbone.patch_tokens(tiny_adapter.preprocess(FRAMES))
    expected = {RAW_LAST: last, RAW_SAME: raw, CENTRED: centred(raw), ADAPTED: adapted}
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), expected)


@pytest.mark.parametrize(("mode", "ending"), [("symmetric", ""), ("causal", " causally")])
def test_fused_and_settled_features_are_the_adapters(
    tiny_adapter: CoSettleAdapter, mode: FusionMode, ending: str
) -> None:
    chosen = feature_variants(
        tiny_adapter, fusion=mode, settle=True, centre=True, baseline_layers=[9]
    )
    found = compare_features(tiny_adapter, FRAMES, variants=chosen)
    streamed = tiny_adapter.stream(FRAMES, temporal_fusion=mode)
    expected = torch.cat([chunk.features for chunk in streamed])
    torch.testing.assert_close(found[f"adapted, fused{ending}"], expected)
    torch.testing.assert_close(found["adapted, centred"], centred(found[ADAPTED]))
    assert not torch.allclose(found[variants.SETTLED], found[ADAPTED])
    single = found["centred layer 9"]
    guide = single - single.mean((2, 3), keepdim=True)
    fused = temporal_fusion(single, guide, mode=mode)
    mine = found[f"centred layer 9, fused{ending}"]
    torch.testing.assert_close(mine, fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "norm"), [((3,), False), ((3,), True), ((11,), False), ((3, 11), False)]
)
def test_what_is_read_is_what_the_config_says(
    tiny_backbone: VisionTransformerBackbone, layers: tuple[int, ...], norm: bool
) -> None:
    width = tiny_backbone.width * len(layers)
    projection = projection_for(tiny_backbone, layers=layers, norm=norm, in_width=width)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    found = compare_features(adapter, FRAMES[:1])
    torch.testing.assert_close(found[ADAPTED], adapter(FRAMES[:1]))
    earlier = [f"{name} layer 3" for name in ("raw", "centred")] if len(layers) > 1 else []
    assert list(found) == [RAW_LAST, RAW_SAME, CENTRED, *earlier, ADAPTED]
    if earlier:
        assert torch.equal(found["raw layer 3"], found[RAW_SAME][:, : tiny_backbone.width])


def test_the_names_say_what_is_compared(tiny_backbone: VisionTransformerBackbone) -> None:
    normed = tiny_backbone.row.final_norm
    last = CoSettleAdapter(tiny_backbone, projection_for(tiny_backbone, layers=(11,), norm=normed))
    assert [each.name for each in feature_variants(last)] == [RAW_LAST, CENTRED, ADAPTED]
    raw = CoSettleAdapter.raw(tiny_backbone)
    assert [each.name for each in feature_variants(raw)] == [RAW_LAST, CENTRED]
    baselines = {"other": projection_for(tiny_backbone, layers=(5,), seed=3)}
    options = {"baselines": baselines, "baseline_layers": [-2], "settle": True, "fusion": "causal"}
    assert [each.name for each in feature_variants(last, **options)] == [
        RAW_LAST, CENTRED, "centred layer 10", ADAPTED, "settled", "other", "other, settled",
        "centred layer 10, fused causally", "adapted, fused causally", "other, fused causally",
    ]  # fmt: skip
    foreign = projection_for(tiny_backbone, fingerprint="another")
    with pytest.raises(BackboneMismatchError, match="foreign was fitted on another backbone"):
        feature_variants(last, baselines={"foreign": foreign})


@pytest.mark.parametrize(
    ("read", "fused", "layer"),
    [((7, 11), [], 8), ((7, 8), [], 6), ((11,), [7], 8), (tuple(range(12)), [], 7)],
)
def test_the_layer_that_judges_is_read_by_nothing_else(
    tiny_backbone: VisionTransformerBackbone, read: tuple[int, ...], fused: list[int], layer: int
) -> None:
    width = tiny_backbone.width * len(read)
    projection = projection_for(tiny_backbone, layers=read, in_width=width)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    guide = variants.guide_variant(
        adapter, feature_variants(adapter, baseline_layers=fused, fusion="symmetric")
    )
    assert (guide.name, guide.reads) == (f"matches of centred layer {layer}", ((layer,), False))
