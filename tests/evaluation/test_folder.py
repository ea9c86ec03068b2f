from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import Clip, folder_clips


def masks_of_two(frames: int = 4, h: int = 12, w: int = 20) -> NDArray[np.uint8]:
    masks = np.zeros((frames, h, w), dtype=np.uint8)
    masks[:, 2:6, 3:9] = 1
    masks[:, 6:10, 10:15] = 7
    return masks


def write_clip(
    folder: Path,
    masks: NDArray[np.uint8],
    *,
    frames: int | None = None,
    at: tuple[int, ...] | None = None,
    mode: str = "P",
) -> Path:
    """A clip whose frame t has grey value 10 t; masks only where ``at`` says."""
    for kind in ("frames", "masks"):
        (folder / kind).mkdir(parents=True)
    for t in range(len(masks) if frames is None else frames):
        Image.fromarray(np.full((*masks.shape[1:], 3), 10 * t, dtype=np.uint8)).save(
            folder / "frames" / f"{t}.png"
        )
    for t, mask in zip(at or range(len(masks)), masks, strict=True):
        image = Image.fromarray(mask, mode="L")
        if mode == "P":
            image = Image.fromarray(mask, mode="P")
            image.putpalette([value // 3 for value in range(768)])
        image.convert(mode).save(folder / "masks" / f"{t}.png")
    return folder


@pytest.mark.parametrize("mode", ["P", "L"])
def test_one_clip_and_a_folder_of_clips(tmp_path: Path, mode: str) -> None:
    masks = masks_of_two(frames=12)
    folder = write_clip(tmp_path / "home" / "cat", masks, mode=mode)
    write_clip(tmp_path / "home" / "dog", masks[:3], mode=mode)
    (tmp_path / "home" / "notes").mkdir()
    (one,) = folder_clips(folder)
    cat, dog = folder_clips(tmp_path / "home")
    assert one.digest() == cat.digest()
    assert (cat.name, len(cat), dog.name, len(dog)) == ("cat", 12, "dog", 3)
    assert isinstance(cat, Clip)
    # ten comes after two
    assert [int(cat.read_frame(t)[0, 0, 0]) for t in (1, 2, 10)] == [10, 20, 100]
    np.testing.assert_array_equal(cat.read_annotations(), masks)
    assert cat.annotated == tuple(range(12))
    assert [clip.name for clip in folder_clips(tmp_path / "home", clips=["dog"])] == ["dog"]


def test_masks_on_some_frames(tmp_path: Path) -> None:
    masks = masks_of_two(3)
    (clip,) = folder_clips(write_clip(tmp_path, masks, frames=20, at=(0, 9, 15)))
    assert clip.annotated == (0, 9, 15)
    assert len(clip) == 20
    np.testing.assert_array_equal(clip.read_annotations(), masks)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_black_and_white_masks_are_one_object(tmp_path: Path, mode: str) -> None:
    masks = (masks_of_two() > 0).astype(np.uint8) * 255
    (clip,) = folder_clips(write_clip(tmp_path, masks, mode=mode))
    np.testing.assert_array_equal(clip.read_annotations(), masks // 255)


def test_labels_that_appear_late(tmp_path: Path) -> None:
    masks = masks_of_two()
    masks[2, 0, :3] = 4
    masks[3, 0, :3] = 9
    folder = write_clip(tmp_path / "cat", masks)
    with pytest.raises(FrameError, match=r"2.png of 'cat' has label.* 4, 9, which the first mask"):
        folder_clips(folder)[0].read_annotations()
    expected = np.where(np.isin(masks, (4, 9)), 255, masks)
    read = folder_clips(folder, late_labels="void")[0].read_annotations()
    np.testing.assert_array_equal(read, expected)
    with pytest.raises(ValueError, match="late_labels='keep'"):
        folder_clips(folder, late_labels="keep")  # type: ignore[arg-type]


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    masks = masks_of_two()
    good = write_clip(tmp_path / "good", masks)
    write_clip(tmp_path / "single", masks[:1])
    write_clip(tmp_path / "stray", masks, frames=3)
    write_clip(tmp_path / "late", masks[1:], frames=4, at=(1, 2, 3))
    write_clip(tmp_path / "unmasked", masks[:0], frames=3)
    (write_clip(tmp_path / "twice", masks) / "frames" / "1.jpg").write_bytes(
        (good / "frames" / "1.png").read_bytes()
    )
    (tmp_path / "alone" / "frames").mkdir(parents=True)
    clips = {clip.name: clip for clip in folder_clips(tmp_path)}
    assert clips.pop("good").read_annotations().shape == masks.shape
    expected = {
        "single": r"single has a single frame, 0.png, so there is nothing to propagate to",
        "stray": r"stray.masks has 1 mask\(s\) without a frame: 3.png; .* frames are 0.png, 1",
        "late": r"first frame of .*late, 0.png, has no mask: the first of them is 1.png",
        "unmasked": r"unmasked is not a clip: expected PNG masks in .*masks, found nothing",
        "twice": r"twice.frames has several files for frame 1; keep one",
        "alone": r"alone is not a clip: expected images in .*frames, found nothing",
    }
    assert set(clips) == set(expected)
    for name, message in expected.items():
        for read in (clips[name].read_annotations, lambda clip=clips[name]: clip.read_frame(0)):
            with pytest.raises(FrameError, match=message):
                read()


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    masks = masks_of_two()
    empty = masks.copy()
    empty[0] = 0
    soft = np.arange(4 * 12 * 20, dtype=np.uint8).reshape(4, 12, 20)
    for name, clip, mode, message in [
        ("empty", empty, "P", r"first mask of 'empty', .*0.png, has no object"),
        ("soft", soft, "L", "masks of 'soft' have 256 different values, .* without anti-aliasing"),
        ("colour", masks, "RGB", r"colour.masks.0.png is a RGB image, expected a palette"),
    ]:
        with pytest.raises(FrameError, match=message):
            folder_clips(write_clip(tmp_path / name, clip, mode=mode))[0].read_annotations()
    folder = write_clip(tmp_path / "small", masks)
    for t in range(4):
        Image.fromarray(masks[t, :6]).save(folder / "masks" / f"{t}.png")
    with pytest.raises(FrameError, match="masks of 'small' are 6 x 20, but its frames are 12 x 20"):
        folder_clips(folder)[0].read_annotations()


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / "cat", masks_of_two())
    with pytest.raises(FrameError, match=r"clisp does not exist, .* Did you mean 'clips'\?"):
        folder_clips(tmp_path / "clisp")
    with pytest.raises(FrameError, match=r"no clip 'cta' in .* Did you mean 'cat'\?"):
        folder_clips(tmp_path / "clips", clips=["cta"])
    with pytest.raises(
        FrameError, match=r"expected frames and masks in it, found 0.png, .*Did you"
    ):
        folder_clips(tmp_path / "clips" / "cat" / "masks")
    with pytest.raises(FrameError, match=r"found clips\. Did you mean .*clips\?"):
        folder_clips(tmp_path)
    (tmp_path / "video" / "Frame").mkdir(parents=True)
    with pytest.raises(FrameError, match=r"found Frame\. Did you mean 'Frame'\?"):
        folder_clips(tmp_path / "video")
