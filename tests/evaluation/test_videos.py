from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.analysis import ADAPTED, RAW_LAST, RAW_SAME, compare_features
from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.evaluation import encoding
from cosettle_adapter.evaluation.classification import classify
from cosettle_adapter.evaluation.encoding import (
    central_square,
    each_readable,
    encoded_chunks,
    joined,
    step_of,
)
from cosettle_adapter.evaluation.frame_features import frame_features
from cosettle_adapter.evaluation.labelled_videos import labelled_videos
from cosettle_adapter.evaluation.pooling import pool_videos
from cosettle_adapter.evaluation.retrieval import retrieve
from cosettle_adapter.video import open_frames

from helpers import projection_for, write_video

if TYPE_CHECKING:
    from cosettle_adapter.backbones import VisionTransformerBackbone


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


def frames_of(path: Path, every: int, most: int) -> torch.Tensor:
    return torch.cat([c.frames for c in open_frames(path, every=every, max_frames=most)])


def test_a_video_is_the_mean_of_its_patches_and_frames(
    tiny_adapter: CoSettleAdapter, folder: Path
) -> None:
    done: list[tuple[int, int]] = []
    videos = labelled_videos(folder)
    pooled = pool_videos(
        tiny_adapter, videos, frames=4, size=48, batch_size=3,
        on_video=lambda *progress: done.append(progress),
    )  # fmt: skip
    assert pooled.videos == tuple(videos)
    assert pooled.labels == ["noisy"] * 3 + ["plain"] * 3
    assert done == [(i, 6) for i in range(1, 7)]
    assert list(pooled.features) == [RAW_LAST, RAW_SAME, ADAPTED]
    for row, video in enumerate(videos):
        frames = frames_of(video.path, every=2, most=4)
        maps = compare_features(tiny_adapter, frames, size=48)
        for kind, values in pooled.features.items():
            torch.testing.assert_close(values[row], maps[kind].mean((0, 2, 3)))


def test_rendered_classes_are_told_apart_end_to_end(
    tiny_adapter: CoSettleAdapter, folder: Path
) -> None:
    pooled = pool_videos(tiny_adapter, labelled_videos(folder), frames=2, size=48)
    report = classify(pooled, ks=(1,), linear=False)
    assert all(result["1-NN"].accuracy == 1.0 for result in report.results.values())
    found = retrieve(pooled)
    assert all(result.recall[1] == 1.0 for result in found.results.values())


def test_a_projection_on_the_last_block_leaves_out_the_doubled_features(
    tiny_backbone: VisionTransformerBackbone, folder: Path
) -> None:
    projection = projection_for(tiny_backbone, layers=(11,), norm=tiny_backbone.row.final_norm)
    adapter = CoSettleAdapter(tiny_backbone, projection)
    pooled = pool_videos(adapter, labelled_videos(folder)[:1], frames=2, size=48)
    assert list(pooled.features) == [RAW_LAST, ADAPTED]


def test_a_broken_video_is_skipped_counted_and_listed(
    tiny_adapter: CoSettleAdapter, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.mp4").write_bytes(b"not a video")
    (tmp_path / "a" / "good.mp4").write_bytes((folder / "plain" / "0.mp4").read_bytes())
    done: list[int] = []
    with caplog.at_level(logging.WARNING):
        pooled = pool_videos(
            tiny_adapter, labelled_videos(tmp_path), frames=2, size=48,
            on_video=lambda count, _: done.append(count),
        )  # fmt: skip
    assert [video.name for video in pooled.videos] == ["a/good.mp4"]
    assert list(pooled.skipped) == ["a/broken.mp4"]
    assert "broken.mp4" in pooled.skipped["a/broken.mp4"]
    assert pooled.features[ADAPTED].shape == (1, 192)
    assert done == [1, 2]
    assert "skipped a/broken.mp4" in caplog.text
    with pytest.raises(FrameError, match=r"none of 1 videos could be read.*a/broken\.mp4"):
        pool_videos(tiny_adapter, labelled_videos(tmp_path)[:1], frames=2)


def test_what_fails_for_every_video_is_not_blamed_on_each() -> None:
    def read(item: str) -> str:
        raise MissingExtraError(f"{item} needs the package 'av'")

    with pytest.raises(MissingExtraError, match="needs the package"):
        each_readable(["a", "b"], read, {})
    with pytest.raises(FrameError, match="got no videos to read"):
        each_readable([], read, {})


def test_frames_have_features_and_times(tiny_adapter: CoSettleAdapter, folder: Path) -> None:
    path = folder / "plain" / "1.mp4"
    features, times = frame_features(tiny_adapter, path, every=3, size=48, batch_size=2)
    torch.testing.assert_close(times, torch.tensor([0, 3, 6]).double() / 25)
    maps = compare_features(tiny_adapter, frames_of(path, 3, 9), size=48)
    torch.testing.assert_close(features[ADAPTED], maps[ADAPTED].mean((2, 3)))


def test_chunks_join_to_the_whole(tiny_adapter: CoSettleAdapter, folder: Path) -> None:
    path = folder / "noisy" / "1.mp4"
    chunks = list(encoded_chunks(tiny_adapter, path, size=48, crop=0.5, batch_size=4))
    assert [tuple(chunk.frames.shape) for chunk in chunks] == [
        (4, 3, 24, 24), (4, 3, 24, 24), (1, 3, 24, 24),
    ]  # fmt: skip
    features, times = joined(chunks)
    assert features[ADAPTED].shape == (9, 192, 3, 3)
    assert len(times) == 9


@pytest.mark.parametrize(
    ("shape", "share", "box"),
    [((40, 60), 1.0, (0, 10, 40)), ((60, 40), 0.5, (20, 10, 20)), ((33, 33), 0.01, (16, 16, 1))],
)
def test_the_square_is_central(
    shape: tuple[int, int], share: float, box: tuple[int, int, int]
) -> None:
    frames = torch.arange(shape[0] * shape[1]).reshape(1, 1, *shape).expand(2, 3, -1, -1)
    top, left, side = box
    expected = frames[..., top : top + side, left : left + side]
    assert torch.equal(central_square(frames, share), expected)
    with pytest.raises(ValueError, match=r"crop of 1\.5"):
        central_square(frames, 1.5)


def test_steps_spread_frames_or_keep_a_rate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "plain" / "0.mp4"  # 9 frames at 25 a second
    assert [step_of(path, frames=n) for n in (1, 2, 4, 9, 20)] == [9, 4, 2, 1, 1]
    assert [step_of(path, rate=rate) for rate in (1.0, 4.0, 25.0, 100.0)] == [25, 6, 1, 1]
    monkeypatch.setattr(encoding, "probe", lambda _: encoding_info(frames=None, fps=None))
    assert step_of("images", frames=4) == step_of("images", rate=4.0) == 1
    with pytest.raises(ValueError, match="frames=0"):
        step_of(path, frames=0)
    with pytest.raises(ValueError, match=r"rate=0\.0"):
        step_of(path, rate=0.0)


def encoding_info(frames: int | None, fps: float | None) -> object:
    from cosettle_adapter.video import SourceInfo

    return SourceInfo(frames=frames, fps=fps)
