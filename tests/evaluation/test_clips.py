from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from drawn import grey, problem_of, save, save_frames

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.clips import Clip, images_in, list_clips, mask_clip, read_masks

MASK = np.zeros((4, 6), dtype=np.uint8)


def test_a_digest_is_of_contents_not_of_sizes(tmp_path: Path) -> None:
    mask, frame = tmp_path / "0.png", np.zeros((2, 2, 3), dtype=np.uint8)
    mask.write_bytes(b"one")
    clip = Clip("clip", [frame], lambda: None, inputs=(mask, b"jpeg", frame, "name"))
    before = clip.digest()
    assert clip.digest() == before
    for part in (b"JPEG", frame + 1, "eman"):
        inputs = tuple(part if type(old) is type(part) else old for old in clip.inputs)
        assert dataclasses.replace(clip, inputs=inputs).digest() != before
    mask.write_bytes(b"two")
    assert clip.digest() != before
    mask.unlink()
    assert clip.digest() != before


def test_one_bad_clip_does_not_lose_the_others() -> None:
    def make(name: str) -> Clip[int]:
        if name == "bad":
            raise FrameError("no frames")
        return Clip(name, [lambda: MASK], lambda: 3)

    good, bad = list_clips("clip", Path("root"), ["good", "bad", "other"], ["good", "bad"], make)
    assert good.read_annotations() == 3
    np.testing.assert_array_equal(good.read_frame(0), MASK)
    assert problem_of(bad) == "clip 'bad': no frames"
    with pytest.raises(FrameError, match=r"no clip 'godo' in root\. Did you mean 'good'\?"):
        list_clips("clip", Path("root"), ["good"], ["godo"], make)
    with pytest.raises(FrameError, match="frame 0 of 'clip' cannot be read"):
        Clip("clip", [b"no picture"], lambda: None).read_frame(0)


@pytest.mark.parametrize(
    ("frames", "masks", "message"),
    [
        ("", "0.png", r"expected images in .*frames, found nothing"),
        ("0.png", "0.jpg", r"expected PNG masks in .*masks, found 0.jpg"),
        ("0.png 1.png", "0.png 1.png 3.png", r"masks without a frame in .*: 3.png; .* 0.png, 1"),
        ("0.png 1.png", "1.png", r"first frame, 0.png, has no mask; expected .*masks.0.png"),
        (
            "0.png 1.jpg 1.png",
            "0.png",
            r"several files for the same frame, such as 1.jpg;",
        ),
    ],
)
def test_frames_and_masks_that_do_not_fit(
    tmp_path: Path, frames: str, masks: str, message: str
) -> None:
    for kind, names in (("frames", frames), ("masks", masks)):
        for name in names.split():
            save(tmp_path / kind / name, MASK, "L")
    with pytest.raises(FrameError, match=message):
        mask_clip("clip", tmp_path / "frames", tmp_path / "masks")


def test_some_frames_have_masks_and_ten_comes_after_two(tmp_path: Path) -> None:
    for first, suffix in enumerate((".png", ".jpeg", ".JPG", ".PNG")):
        save_frames(tmp_path / "frames", range(first, 12, 4), (4, 6), f"{{}}{suffix}")
    for t in (0, 2, 10):
        save(tmp_path / "masks" / f"{t}.PNG", MASK + t, "P")
    (tmp_path / "masks" / "._2.png").write_bytes(b"what macOS keeps beside a file")
    clip = mask_clip("clip", tmp_path / "frames", tmp_path / "masks")
    assert [grey(clip, t) for t in range(12)] == list(range(12))
    assert clip.annotated == (0, 2, 10)
    np.testing.assert_array_equal(clip.read_annotations()[:, 0, 0], [0, 2, 10])


def test_masks_that_are_none_are_named(tmp_path: Path) -> None:
    for name, mask, mode in (
        ("0", MASK, "L"), ("1", MASK[:3], "L"), ("2", np.stack([MASK] * 3, 2), "RGB"),
    ):  # fmt: skip
        save(tmp_path / f"{name}.png", mask, mode)
    (tmp_path / "3.png").write_bytes(b"not a picture")
    first, *others = images_in(tmp_path)
    messages = (
        r"1.png is 3 x 6, but the clip's first mask is 4 x 6",
        r"2.png is a RGB image, expected a palette",
        r"3.png cannot be read as a mask",
    )
    for other, message in zip(others, messages, strict=True):
        with pytest.raises(FrameError, match=message):
            read_masks([first, other])
