from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import (
    Clip,
    iter_tapvid_clips,
    tapvid_clips,
)

T, H, W, N = 4, 12, 20, 3


def entry(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (T, H, W, 3)).astype(np.uint8),
        "points": rng.random((N, T, 2)).astype(np.float32),
        "occluded": rng.random((N, T)) > 0.7,
    }


def jpegs(seed: int = 0) -> list[bytes]:
    encoded = []
    for t in range(T):
        buffer = io.BytesIO()
        picture = np.full((H, W, 3), 10 * t + seed, dtype=np.uint8)
        Image.fromarray(picture).save(buffer, format="JPEG", quality=100)
        encoded.append(buffer.getvalue())
    return encoded


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_dict_of_videos(tmp_path: Path, protocol: int) -> None:
    content = {"goat": entry(0), "car": entry(1)}
    clips = tapvid_clips(write(tmp_path / "tapvid_davis.pkl", content, protocol))
    assert [clip.name for clip in clips] == ["goat", "car"]
    for clip, expected in zip(clips, content.values(), strict=True):
        assert isinstance(clip, Clip)
        assert len(clip) == T
        np.testing.assert_array_equal(clip.read_annotations().points, expected["points"])
        np.testing.assert_array_equal(clip.read_annotations().occluded, expected["occluded"])
        for t in range(T):
            np.testing.assert_array_equal(clip.read_frame(t), expected["video"][t])
        frame = clip.read_frame(0)
        frame[:] = 0  # a frame is the caller's own
        assert clip.read_frame(0).any()


@pytest.mark.parametrize("kind", [list, np.array, lambda x: np.array(x, dtype=object)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_frames_as_jpeg_files(tmp_path: Path, kind: Any, protocol: int) -> None:
    content = [{**entry(), "video": kind(jpegs())}]
    (clip,) = tapvid_clips(write(tmp_path / "0000_of_0010.pkl", content, protocol))
    assert len(clip) == T
    assert clip.read_frame(2).shape == (H, W, 3)
    assert abs(int(clip.read_frame(2).mean()) - 20) <= 1


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    write(tmp_path / "0001_of_0002.pkl", [entry(1)])
    write(tmp_path / "0000_of_0002.pkl", [entry(0), entry(2)])
    (tmp_path / "README").touch()
    names = [clip.name for clip in iter_tapvid_clips(tmp_path)]
    assert names == ["0000_of_0002_0000", "0000_of_0002_0001", "0001_of_0002_0000"]
    later = tmp_path / "0001_of_0002.pkl"
    clips = iter_tapvid_clips(tmp_path)
    next(clips)
    later.unlink()  # not read yet
    assert next(clips).problem is None
    assert "cannot be read" in str(next(clips).problem)


def test_one_bad_video_does_not_lose_the_others(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "good": entry(),
        "pointless": {"video": entry()["video"], "tracks": 1},
        "no dict": 3,
        "short": {**entry(), "points": entry()["points"][:, :2]},
        "grey": {**entry(), "video": entry()["video"][..., 0]},
        "unclear": {**entry(), "occluded": np.full((N, T), 0.5)},
        "text": {**entry(), "video": ["a"] * T},
    }
    clips = {clip.name: clip for clip in tapvid_clips(write(tmp_path / "davis.pkl", content))}
    assert clips.pop("good").read_frame(0).shape == (H, W, 3)
    expected = {
        "pointless": r"has \['tracks', 'video'\], expected video, points, occluded",
        "no dict": "has int, expected video",
        "short": r"points of shape \(3, 2, 2\) .* expected \(N, 4, 2\)",
        "grey": r"has no frames: expected uint8 \(T, H, W, 3\)",
        "unclear": "has points of shape",
        "text": "has no frames",
    }
    assert set(clips) == set(expected)
    for name, message in expected.items():
        for read in (clips[name].read_annotations, lambda clip=clips[name]: clip.read_frame(0)):
            with pytest.raises(FrameError, match=f"TAP-Vid video '{name}' of .*{message}"):
                read()


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    video = jpegs()
    video[1] = video[1][:40]
    (clip,) = tapvid_clips(write(tmp_path / "a.pkl", {"goat": {**entry(), "video": video}}))
    assert clip.read_frame(0).shape == (H, W, 3)
    with pytest.raises(FrameError, match="frame 1 of 'goat' cannot be read"):
        clip.read_frame(1)


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    write(tmp_path / "tapvid_davis.pkl", {"a": entry()})
    with pytest.raises(FrameError, match=r"Did you mean 'tapvid_davis.pkl'"):
        tapvid_clips(tmp_path / "tapvid_davsi.pkl")
    (tmp_path / "tapvid").mkdir()
    (tmp_path / "tapvid" / "tapvid_davis.zip").touch()
    with pytest.raises(FrameError, match=r"holds no .pkl, .*; found tapvid_davis.zip"):
        tapvid_clips(tmp_path / "tapvid")
    for content, message in [
        (entry(), "holds one video's entries"),
        ("text", "holds a str, expected a pickle of TAP-Vid"),
    ]:
        with pytest.raises(FrameError, match=message):
            tapvid_clips(write(tmp_path / "odd.pkl", content))
