from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import extract
from cosettle_adapter.feature_file import read_features

from helpers import write_video


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", frames=40, height=48, width=64, fps=20)


def test_a_video_becomes_a_feature_file(
    tiny_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    result = extract(
        tiny_adapter, clip, tmp_path / "f.safetensors", max_frames=10, batch_size=4,
        on_chunk=seen.append,
    )  # fmt: skip
    assert (result.frames, result.shape, result.truncated) == (10, (192, 3, 4), None)
    assert seen == [4, 8, 10]
    read = read_features(result.path)
    streamed = torch.cat([c.features for c in tiny_adapter.stream(clip, max_frames=10)])
    torch.testing.assert_close(read.features, streamed, atol=1e-5, rtol=0)
    torch.testing.assert_close(read.timestamps, torch.arange(10).double() / 20)
    assert read.geometry == tiny_adapter.geometry(48, 64)
    assert read.metadata["source"] == "clip.mp4"
    assert read.metadata["fingerprint"] == tiny_adapter.backbone.fingerprint


def test_storage_dtype(tiny_adapter: CoSettleAdapter, clip: Path, tmp_path: Path) -> None:
    result = extract(
        tiny_adapter, clip, tmp_path / "f.safetensors", max_frames=2, storage=torch.float16
    )
    assert read_features(result.path).features.dtype == torch.float16


def test_a_truncated_video_keeps_what_was_readable(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=120, height=48, width=64, fps=20, noisy=True)
    content = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    result = extract(tiny_adapter, tmp_path / "cut.mkv", tmp_path / "f.safetensors")
    assert 0 < result.frames < 120
    assert result.truncated is not None
    assert "truncated" in result.truncated
    assert len(read_features(result.path).features) == result.frames


def test_an_interrupt_leaves_an_earlier_file_as_it_was(
    tiny_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "f.safetensors"
    destination.write_bytes(b"earlier")

    def interrupt(frames: int) -> None:
        if frames >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(tiny_adapter, clip, destination, batch_size=4, on_chunk=interrupt)
    assert destination.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "f.safetensors"]


def test_a_full_disk_leaves_no_file(
    tiny_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cosettle_adapter.feature_file.FeatureWriter.append", full)
    with pytest.raises(OSError, match="No space left"):
        extract(tiny_adapter, clip, tmp_path / "f.safetensors", max_frames=3)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_range_without_frames(tiny_adapter: CoSettleAdapter, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"has no frame from 100\.0 s on"):
        extract(tiny_adapter, clip, tmp_path / "f.safetensors", start=100.0)
    assert not (tmp_path / "f.safetensors").exists()


def test_no_more_than_a_few_frames_are_alive(tiny_adapter: CoSettleAdapter, tmp_path: Path) -> None:
    produced: list[int] = []
    written = 0
    ahead = 0

    def frames() -> Iterator[torch.Tensor]:
        for index in range(60):
            produced.append(index)
            yield torch.zeros(3, 16, 16, dtype=torch.uint8)

    def on_chunk(count: int) -> None:
        nonlocal written, ahead
        written = count
        ahead = max(ahead, len(produced) - written)

    extract(tiny_adapter, frames(), tmp_path / "f.safetensors", batch_size=4, on_chunk=on_chunk)
    assert written == 60
    assert ahead <= 5 * 4
