from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import grey, problem_of
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import tapvid_clips

T, H, W, N = 4, 12, 20, 3


def entry(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(len(changes))
    return {
        "video": rng.integers(0, 256, (T, H, W, 3)).astype(np.uint8),
        "points": rng.random((N, T, 2)).astype(np.float32),
        "occluded": rng.random((N, T)) > 0.7,
        **changes,
    }


def jpegs() -> list[bytes]:
    encoded = [io.BytesIO() for _ in range(T)]
    for t, buffer in enumerate(encoded):
        Image.fromarray(np.full((H, W, 3), 10 * t, dtype=np.uint8)).save(buffer, format="JPEG")
    return [buffer.getvalue() for buffer in encoded]


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_dict_of_videos(tmp_path: Path, protocol: int) -> None:
    content = {"goat": entry(), "car": entry(more=1)}
    path = write(tmp_path / "tapvid_davis.pkl", content, protocol)
    clips = tapvid_clips(path)
    assert [(clip.name, len(clip)) for clip in clips] == [("goat", T), ("car", T)]
    for clip, expected in zip(clips, content.values(), strict=True):
        np.testing.assert_array_equal(clip.read_annotations().points, expected["points"])
        np.testing.assert_array_equal(clip.read_annotations().occluded, expected["occluded"])
        np.testing.assert_array_equal(clip.read_frame(2), expected["video"][2])
        clip.read_frame(0)[:] = 0  # a frame is the caller's own
        assert clip.read_frame(0).any()
    assert [clip.name for clip in tapvid_clips(path, clips=["car"])] == ["car"]


@pytest.mark.parametrize("kind", [list, np.array, lambda x: np.array(x, dtype=object)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_frames_as_jpeg_files(tmp_path: Path, kind: Any, protocol: int) -> None:
    damaged = [*jpegs()[:1], jpegs()[1][:40], *jpegs()[2:]]
    content = [entry(video=kind(jpegs())), entry(video=kind(damaged))]
    whole, broken = tapvid_clips(write(tmp_path / "0000_of_0010.pkl", content, protocol))
    assert (whole.name, len(whole), grey(whole, 2)) == ("0000_of_0010_0000", T, 2)
    assert grey(broken, 0) == 0
    with pytest.raises(FrameError, match="frame 1 of '0000_of_0010_0001' cannot be read"):
        broken.read_frame(1)


def test_a_folder_is_read_in_order_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "1.pkl", [entry()])
    write(tmp_path / "0.pkl", [entry(), entry()])
    (tmp_path / "README").touch()
    assert [clip.name for clip in tapvid_clips(tmp_path)] == ["0_0000", "0_0001", "1_0000"]


def test_one_bad_video_does_not_lose_the_others(tmp_path: Path) -> None:
    messages = {
        "pointless": r"got \['occluded', 'tracks', 'video'\], expected video, points, occluded",
        "no dict": "got int, expected video",
        "short": r"points of shape \(3, 2, 2\) .* numbers \(N, 4, 2\)",
        "grey": r"no frames; expected uint8 \(T, H, W, 3\)",
        "unclear": r"occlusion of shape \(3, 4\), expected",
        "text": "no frames",
    }
    pointless = {"tracks": 1, **{name: entry()[name] for name in ("video", "occluded")}}
    content = {
        "good": entry(),
        "pointless": pointless,
        "no dict": 3,
        "short": entry(points=entry()["points"][:, :2]),
        "grey": entry(video=entry()["video"][..., 0]),
        "unclear": entry(occluded=np.full((N, T), 0.5)),
        "text": entry(video=["a"] * T),
    }
    good, *bad = tapvid_clips(write(tmp_path / "davis.pkl", content))
    assert good.read_frame(0).shape == (H, W, 3)
    assert [clip.name for clip in bad] == list(messages)
    for clip, message in zip(bad, messages.values(), strict=True):
        assert re.search(f"TAP-Vid video '{clip.name}': .*{message}", problem_of(clip))


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    write(tmp_path / "tapvid_davis.pkl", {"a": entry()})
    (tmp_path / "tapvid").mkdir()
    (tmp_path / "tapvid" / "tapvid_davis.zip").touch()
    for path, message in [
        (tmp_path / "tapvid_davsi.pkl", r"Did you mean 'tapvid_davis.pkl'"),
        (tmp_path / "tapvid", r"holds no .pkl, .*; found tapvid_davis.zip"),
        (write(tmp_path / "one.pkl", entry()), "holds one video's entries"),
        (write(tmp_path / "odd.pkl", "text"), "holds a str, expected a pickle of TAP-Vid"),
    ]:
        with pytest.raises(FrameError, match=message):
            tapvid_clips(path)
