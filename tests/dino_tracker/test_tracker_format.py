from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dino_tracker_interface import make_clip, small_adapter, with_dot

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.dino_tracker import DinoTrackerError, cells, tracker_features
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import extract
from cosettle_adapter.extraction.errors import FormatError


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return make_clip(tmp_path, [with_dot(100 + 14 * t, 90) for t in range(5)]) / "video"


@pytest.fixture(scope="module")
def adapter() -> CoSettleAdapter:
    return small_adapter(14)


def test_extract_writes_what_the_tracker_reads(
    adapter: CoSettleAdapter, video: Path, tmp_path: Path
) -> None:
    result = extract(adapter, video, tmp_path / "dino_embed_video.pt", batch_size=2)
    assert (result.frames, result.shape) == (5, (1024, 34, 61))
    features = torch.load(result.path, map_location="cpu", weights_only=True)
    frames = [with_dot(100 + 14 * t, 90) for t in range(5)]
    expected = torch.cat(list(tracker_features(adapter, frames, stride=14)))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_stride_7_and_frames_of_any_size(video: Path, tmp_path: Path) -> None:
    adapter = small_adapter(16, 7)
    frames = [torch.randint(0, 256, (3, 120, 200), dtype=torch.uint8)]
    result = extract(adapter, iter(frames), tmp_path / "f.pt")
    assert result.shape == (1024, *cells(7).grid)


def test_a_run_that_broke_off_goes_on_to_the_same_file(
    adapter: CoSettleAdapter, video: Path, tmp_path: Path
) -> None:
    def stop(frames: int) -> None:
        if frames >= 4:
            raise KeyboardInterrupt

    whole = extract(adapter, video, tmp_path / "whole.pt", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        extract(adapter, video, tmp_path / "broken.pt", batch_size=2, on_chunk=stop)
    assert not (tmp_path / "broken.pt").exists()
    resumed = extract(adapter, video, tmp_path / "broken.pt", batch_size=2)
    assert resumed.found > 0
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_what_the_format_cannot_hold(adapter: CoSettleAdapter, video: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="leave --size and --fit out"):
        extract(adapter, video, tmp_path / "f.pt", size=224)
    with pytest.raises(FormatError, match="float32"):
        extract(adapter, video, tmp_path / "f.pt", storage=torch.float16)
    with pytest.raises(DinoTrackerError, match="1040 channels"):
        extract(small_adapter(14, width=1040), video, tmp_path / "f.pt")
    with pytest.raises(FrameError):
        extract(adapter, tmp_path / "nowhere", tmp_path / "f.pt")
    assert not (tmp_path / "f.pt").exists()
