from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import VIP_CLASSES, Clip, ConfusionMatrix, vip_clips

LISTED = ["videos12", "videos8"]


def write_vip(root: Path, *, labels: str = "Annotations/Category_ids") -> Path:
    """Three videos of three frames, 25 apart, two of them for validation."""
    for video in ("videos12", "videos8", "videos1"):
        for folder in (root / "Images" / video, root / labels / video):
            folder.mkdir(parents=True)
        for t in (1, 26, 51):
            picture = Image.fromarray(np.full((8, 10, 3), t, dtype=np.uint8))
            picture.save(root / "Images" / video / f"{t:012d}.jpg", quality=100)
            mask = Image.fromarray(np.full((8, 10), t % VIP_CLASSES, dtype=np.uint8))
            mask.save(root / labels / video / f"{t:012d}.png")
    (root / "lists").mkdir()
    (root / "lists" / "val_videos.txt").write_text("\n".join(LISTED) + "\n")
    return root


@pytest.mark.parametrize("labels", ["Annotations/Category_ids", "Category_ids"])
def test_the_official_layout(tmp_path: Path, labels: str) -> None:
    clips = vip_clips(write_vip(tmp_path, labels=labels))
    assert [clip.name for clip in clips] == LISTED
    clip = clips[0]
    assert isinstance(clip, Clip)
    assert len(clip) == 3
    assert clip.annotated == (0, 1, 2)
    assert abs(int(clip.read_frame(1).mean()) - 26) <= 2
    masks = clip.read_annotations()
    np.testing.assert_array_equal(masks[:, 0, 0], [1, 6, 11])
    matrix = ConfusionMatrix(VIP_CLASSES)
    matrix.add(masks, masks)
    assert matrix.mean_iou() == 1


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("lists/val_videos.txt", LISTED),
        (
            "lists/val_id.txt",
            ["videos12/000000000001", "videos12/000000000026", "videos8/000000000001"],
        ),
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
    names = ["videos12", "videos8", "videos1", "videos404"]
    (root / "lists" / "val_videos.txt").write_text("\n".join(names))
    labels = root / "Annotations" / "Category_ids"
    (root / "Images" / "videos8" / f"{26:012d}.jpg").unlink()
    (labels / "videos1" / f"{1:012d}.png").unlink()
    good, stray, late, gone = vip_clips(root)
    assert good.read_annotations().shape == (3, 8, 10)
    for clip, message in [
        (stray, r"'videos8' has masks without a frame in .*: 000000000026.png"),
        (late, r"'videos1' has no mask for its first frame 000000000001.jpg, expected .*01.png"),
        (gone, r"'videos404' has no frames: .*videos404 holds nothing"),
    ]:
        with pytest.raises(FrameError, match=message):
            clip.read_annotations()
        with pytest.raises(FrameError, match=message):
            clip.read_frame(0)


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    root = write_vip(tmp_path / "VIP" / "VIP_Fine")
    with pytest.raises(FrameError, match=r"expected Images in it, found VIP_Fine\. Did you mean"):
        vip_clips(tmp_path / "VIP")
    with pytest.raises(FrameError, match=r"no train list in .*train_videos.txt, found val_videos"):
        vip_clips(root, subset="train")
    with pytest.raises(FrameError, match=r"no vall list .* Did you mean 'val'\?"):
        vip_clips(root, subset="vall")
    (root / "Annotations" / "Category_ids").rename(root / "Annotations" / "category")
    with pytest.raises(FrameError, match=r"expected Annotations/Category_ids in it, found Annot"):
        vip_clips(root)
