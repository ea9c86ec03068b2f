from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn import grey, problem_of, save, save_frames

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import vip_clips

LISTED = ["videos12", "videos8"]


def write_vip(root: Path, *, labels: str = "Annotations/Category_ids") -> Path:
    """Three videos of three frames, two of them for validation."""
    for video in ("videos12", "videos8", "videos1"):
        save_frames(root / "Images" / video, (1, 6, 11), (8, 10), "{:012d}.jpg")
        for t in (1, 6, 11):
            save(root / labels / video / f"{t:012d}.png", np.full((8, 10), t, np.uint8), "L")
    (root / "lists").mkdir()
    (root / "lists" / "val_videos.txt").write_text("\n".join(LISTED) + "\n")
    return root


@pytest.mark.parametrize("labels", ["Annotations/Category_ids", "Category_ids"])
def test_the_official_layout(tmp_path: Path, labels: str) -> None:
    clips = vip_clips(write_vip(tmp_path, labels=labels))
    assert [clip.name for clip in clips] == LISTED
    assert (len(clips[0]), clips[0].annotated) == (3, (0, 1, 2))
    assert grey(clips[0], 1) == 6
    np.testing.assert_array_equal(clips[0].read_annotations()[:, 0, 0], [1, 6, 11])


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("lists/val_id.txt", [f"{v}/{t:012d}" for v in LISTED for t in (1, 6)]),
        ("val_videos.txt", [f"VIP/Images/{v} VIP/Annotations/Category_ids/{v}" for v in LISTED]),
    ],
)
def test_the_lists_that_are_about(tmp_path: Path, name: str, lines: list[str]) -> None:
    root = write_vip(tmp_path)
    (root / "lists" / "val_videos.txt").unlink()
    (root / name).write_text("\n".join(lines))
    assert [clip.name for clip in vip_clips(root)] == LISTED


def test_one_bad_video_does_not_lose_the_others(tmp_path: Path) -> None:
    root = write_vip(tmp_path)
    (root / "lists" / "val_videos.txt").write_text("videos12\n\nvideos8\nvideos404")
    (root / "Images" / "videos8" / f"{6:012d}.jpg").unlink()
    good, stray, gone = vip_clips(root)
    assert good.read_annotations().shape == (3, 8, 10)
    assert "VIP video 'videos8': masks without a frame" in problem_of(stray)
    assert "VIP video 'videos404': expected images in" in problem_of(gone)
    assert [clip.name for clip in vip_clips(root, clips=["videos1"])] == ["videos1"]


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    root = write_vip(tmp_path / "VIP" / "VIP_Fine")
    with pytest.raises(FrameError, match=r"expected Images in it, found VIP_Fine\. Did you mean"):
        vip_clips(tmp_path / "VIP")
    with pytest.raises(FrameError, match=r"no VIP video 'videos21' in .* Did you mean 'videos1'"):
        vip_clips(root, clips=["videos21"])
    (root / "Annotations" / "Category_ids").rename(root / "Annotations" / "Category_id")
    with pytest.raises(FrameError, match=r"expected Annotations/Category_ids .* 'Category_id'\?"):
        vip_clips(root)
