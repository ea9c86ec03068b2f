from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn import problem_of, save, save_frames
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import folder_clips

MASKS = np.zeros((4, 12, 20), dtype=np.uint8)
MASKS[:, 2:6, 3:9] = 1
MASKS[:, 6:10, 10:15] = 7


def write_clip(folder: Path, masks: NDArray[np.uint8] = MASKS, mode: str = "P") -> Path:
    save_frames(folder / "frames", range(len(masks)), (12, 20))
    for t, mask in enumerate(masks):
        save(folder / "masks" / f"{t}.png", mask, mode)
    return folder


@pytest.mark.parametrize("mode", ["P", "L"])
def test_one_clip_and_a_folder_of_clips(tmp_path: Path, mode: str) -> None:
    folder = write_clip(tmp_path / "cat", mode=mode)
    write_clip(tmp_path / "dog", MASKS[:3], mode=mode)
    (tmp_path / "notes").mkdir()
    (tmp_path / "alone" / "masks").mkdir(parents=True)
    (one,) = folder_clips(folder)
    alone, cat, dog = folder_clips(tmp_path)
    assert one.digest() == cat.digest()
    assert (cat.name, len(cat), dog.name, len(dog)) == ("cat", 4, "dog", 3)
    np.testing.assert_array_equal(cat.read_annotations(), MASKS)
    assert "clip 'alone': expected images in" in problem_of(alone)
    assert [clip.name for clip in folder_clips(tmp_path, clips=["dog"])] == ["dog"]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_black_and_white_masks_are_one_object(tmp_path: Path, mode: str) -> None:
    masks = (MASKS > 0).astype(np.uint8)
    (clip,) = folder_clips(write_clip(tmp_path, 255 * masks, mode=mode))
    np.testing.assert_array_equal(clip.read_annotations(), masks)


def test_labels_that_appear_late(tmp_path: Path) -> None:
    masks = MASKS.copy()
    masks[2, 0, :3], masks[3, 0, :3] = 4, 9
    folder = write_clip(tmp_path / "cat", masks)
    with pytest.raises(FrameError, match=r"2.png of 'cat' has label\(s\) 4, 9, which the"):
        folder_clips(folder)[0].read_annotations()
    expected = np.where(np.isin(masks, (4, 9)), 255, masks)
    read = folder_clips(folder, late_labels="void")[0].read_annotations()
    np.testing.assert_array_equal(read, expected)
    with pytest.raises(ValueError, match="late_labels='keep'"):
        folder_clips(folder, late_labels="keep")  # type: ignore[arg-type]


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    soft = np.arange(MASKS.size, dtype=np.uint8).reshape(MASKS.shape)
    with pytest.raises(FrameError, match=r"'soft' have 256 different values, .*anti-aliasing"):
        folder_clips(write_clip(tmp_path / "soft", soft))[0].read_annotations()
    folder = write_clip(tmp_path / "small")
    for t in range(4):
        save(folder / "masks" / f"{t}.png", MASKS[t, :6], "L")
    with pytest.raises(FrameError, match="masks of 'small' are 6 x 20, but its frames are 12 x 20"):
        folder_clips(folder)[0].read_annotations()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("clisp", r"clisp does not exist, .* Did you mean 'clips'\?"),
        ("clips/cat/masks", r"found 0.png, .*Did you mean .*cat\?"),
        (".", r"found clips, video\. Did you mean .*clips\?"),
        ("video", r"found Frame\. Did you mean 'Frame'\?"),
    ],
)
def test_wrong_folders_are_explained(tmp_path: Path, folder: str, message: str) -> None:
    write_clip(tmp_path / "clips" / "cat")
    (tmp_path / "video" / "Frame").mkdir(parents=True)
    with pytest.raises(FrameError, match=message):
        folder_clips(tmp_path / folder)
