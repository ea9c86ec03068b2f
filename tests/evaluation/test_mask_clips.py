from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn import grey, moving_squares, problem_of, save, save_frames, write_davis
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import davis_clips, davis_protocol, folder_clips, vip_clips
from cosettle_adapter.evaluation.clips import Clip, images_in, list_clips, mask_clip, read_masks
from cosettle_adapter.video import FrameSelection

MASKS = moving_squares()[1]


def test_the_official_2017_layout(tmp_path: Path) -> None:
    walk, run = davis_clips(write_davis(tmp_path, {"walk": MASKS, "run": MASKS[::-1]}))
    assert (walk.name, len(walk), walk.annotated) == ("walk", 5, (0, 1, 2, 3, 4))
    np.testing.assert_array_equal(walk.read_annotations(), MASKS)
    assert (run.name, grey(run, 3)) == ("run", 3)


def test_the_2016_layout_merges_objects(tmp_path: Path) -> None:
    masks = np.where(MASKS == 2, 255, MASKS)  # the 2016 release draws its one object in white
    lists = write_davis(tmp_path, {"walk": masks}, year="480p") / "ImageSets" / "480p"
    (lists / "val.txt").unlink()  # the list of train alone, of frames
    lines = [f"/JPEGImages/480p/walk/{t:05d}.jpg /Annotations/480p/walk/x.png" for t in range(5)]
    (lists / "train.txt").write_text("\n".join(lines))
    (clip,) = davis_clips(tmp_path)
    assert clip.name == "walk"
    np.testing.assert_array_equal(clip.read_annotations(), (masks > 0) * 1)


def test_several_folders_are_parts_of_one_evaluation(tmp_path: Path) -> None:
    one = write_davis(tmp_path / "one", {"walk": MASKS, "run": MASKS})
    two = write_davis(tmp_path / "two", {"walk": MASKS})
    select = [FrameSelection(every=2), FrameSelection()]
    protocol = davis_protocol(one, two, select=select)
    found = [(clip.name, len(clip)) for clip in protocol.clips()]
    assert found == [("one/walk", 3), ("one/run", 3), ("two/walk", 5)]
    assert protocol.settings["parts"] == ["one", "two"]
    assert protocol.settings["every"] == [2, 1]
    for wanted, names in (("walk", ["one/walk", "two/walk"]), ("two/walk", ["two/walk"])):
        assert [c.name for c in davis_protocol(one, two, clips=[wanted]).clips()] == names
    with pytest.raises(FrameError, match=r"no clip 'wlak'.* Did you mean 'walk'"):
        davis_protocol(one, two, clips=["wlak"]).clips()
    for folders, number in (((one, one), 1), ((one, two), 3)):
        with pytest.raises(ValueError, match="expected one for all or one for each"):
            davis_protocol(*folders, select=[FrameSelection()] * number)


@pytest.mark.parametrize(
    ("select", "stems"),
    [
        (FrameSelection(every=2, max_frames=2), ["00000", "00002"]),
        (FrameSelection(start=0.5, end=2.0, source_fps=2.0), ["00001", "00002", "00003"]),
    ],
)
def test_frames_are_chosen(tmp_path: Path, select: FrameSelection, stems: list[str]) -> None:
    (clip,) = davis_clips(write_davis(tmp_path, {"walk": MASKS}), select=select)
    assert [path.stem for path in clip.frames] == stems
    chosen = [int(stem) for stem in stems]
    np.testing.assert_array_equal(clip.read_annotations(), MASKS[chosen])


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"run": MASKS, "walk": MASKS, "gone": MASKS})
    (root / "Annotations" / "480p" / "walk" / "00003.png").unlink()
    shutil.rmtree(root / "JPEGImages" / "480p" / "gone")
    good, unannotated, gone = davis_clips(root)
    assert good.read_annotations().shape == MASKS.shape
    assert "DAVIS-2017 clip 'walk': no " in problem_of(unannotated)
    assert "00003.png; unpack" in problem_of(unannotated)
    assert "gone/*.jpg" in Path(problem_of(gone)).as_posix()
    (root / "JPEGImages" / "480p" / "run" / "00001.jpg").write_bytes(b"not a picture")
    with pytest.raises(FrameError, match=r"00001.jpg cannot be read as an image"):
        davis_clips(root)[0].read_frame(1)


SHAPES = np.zeros((4, 12, 20), dtype=np.uint8)
SHAPES[:, 2:6, 3:9] = 1
SHAPES[:, 6:10, 10:15] = 7


def write_folder(folder: Path, masks: NDArray[np.uint8] = SHAPES, mode: str = "P") -> Path:
    save_frames(folder / "frames", range(len(masks)), (12, 20))
    for t, mask in enumerate(masks):
        save(folder / "masks" / f"{t}.png", mask, mode)
    return folder


@pytest.mark.parametrize("mode", ["P", "L"])
def test_one_clip_and_a_folder_of_clips(tmp_path: Path, mode: str) -> None:
    folder = write_folder(tmp_path / "cat", mode=mode)
    write_folder(tmp_path / "dog", SHAPES[:3], mode=mode)
    (tmp_path / "notes").mkdir()
    (tmp_path / "alone" / "masks").mkdir(parents=True)
    (one,) = folder_clips(folder)
    alone, cat, dog = folder_clips(tmp_path)
    assert one.digest() == cat.digest()
    assert (cat.name, len(cat), dog.name, len(dog)) == ("cat", 4, "dog", 3)
    np.testing.assert_array_equal(cat.read_annotations(), SHAPES)
    assert "clip 'alone': expected images in" in problem_of(alone)
    assert [clip.name for clip in folder_clips(tmp_path, clips=["dog"])] == ["dog"]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_black_and_white_masks_are_one_object(tmp_path: Path, mode: str) -> None:
    masks = (SHAPES > 0).astype(np.uint8)
    (clip,) = folder_clips(write_folder(tmp_path, 255 * masks, mode=mode))
    np.testing.assert_array_equal(clip.read_annotations(), masks)


def test_labels_that_appear_late(tmp_path: Path) -> None:
    masks = SHAPES.copy()
    masks[2, 0, :3], masks[3, 0, :3] = 4, 9
    folder = write_folder(tmp_path / "cat", masks)
    with pytest.raises(FrameError, match=r"2.png of 'cat' has label\(s\) 4, 9, which the"):
        folder_clips(folder)[0].read_annotations()
    read = folder_clips(folder, late_labels="keep")[0].read_annotations()
    np.testing.assert_array_equal(read, masks)
    with pytest.raises(ValueError, match="late_labels='void'"):
        folder_clips(folder, late_labels="void")  # type: ignore[arg-type]


def test_ids_with_gaps_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_clips(write_folder(tmp_path, SHAPES * 3))[0].read_annotations()
    assert "has object 1, 2" in caplog.text


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    soft = np.arange(SHAPES.size, dtype=np.uint8).reshape(SHAPES.shape)
    with pytest.raises(FrameError, match=r"soft.masks have 256 different values, .*anti-aliasing"):
        folder_clips(write_folder(tmp_path / "soft", soft))[0].read_annotations()
    folder = write_folder(tmp_path / "small")
    for t in range(4):
        save(folder / "masks" / f"{t}.png", SHAPES[t, :6], "L")
    with pytest.raises(FrameError, match=r"small.masks are 6 x 20, but .* frames are 12 x 20"):
        folder_clips(folder)[0].read_annotations()


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
def test_the_official_layout_of_vip(tmp_path: Path, labels: str) -> None:
    clips = vip_clips(write_vip(tmp_path, labels=labels))
    assert [clip.name for clip in clips] == LISTED
    assert (len(clips[0]), clips[0].annotated, grey(clips[0], 1)) == (3, (0, 1, 2), 6)
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


def test_one_bad_video_of_vip_does_not_lose_the_others(tmp_path: Path) -> None:
    root = write_vip(tmp_path)
    (root / "lists" / "val_videos.txt").write_text("videos12\n\nvideos8\nvideos404")
    (root / "Images" / "videos8" / f"{6:012d}.jpg").unlink()
    good, stray, gone = vip_clips(root)
    assert good.read_annotations().shape == (3, 8, 10)
    assert "VIP video 'videos8': masks without a frame" in problem_of(stray)
    assert "VIP video 'videos404': expected images in" in problem_of(gone)
    assert [clip.name for clip in vip_clips(root, clips=["videos1"])] == ["videos1"]


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    write_davis(tmp_path / "d" / "DAVIS", {"walk": MASKS})
    write_folder(tmp_path / "f" / "clips" / "cat")
    (tmp_path / "f" / "video" / "Frame").mkdir(parents=True)
    fine = write_vip(tmp_path / "v" / "VIP" / "VIP_Fine")
    for list_them, folder, options, message in (
        (davis_clips, "d/DAVIS/JPEGImages", {}, r"in it, found 480p\. Did you mean .*DAVIS\?"),
        (davis_clips, "d", {}, r"JPEGImages/480p, .*found DAVIS\. Did you mean .*DAVIS\?"),
        (davis_clips, "d/DAVIS/ImageSets/2017/val.txt", {}, "val.txt is a file, expected the fold"),
        (davis_clips, "d/DAVIS", {"subset": "vall"}, r"no list of clips .* mean 'val.txt'\?"),
        (davis_clips, "d/DAVIS", {"year": "2016"}, r"ImageSets.2016.val.txt; found nothing"),
        (davis_clips, "d/DAVIS", {"clips": ["wlak"]}, r"DAVIS-2017 clip 'wlak'.* mean 'walk'"),
        (davis_clips, "d/DAVIS", {"resolution": "48p"}, r"JPEGImages/48p, .* mean '480p'"),
        (folder_clips, "f/clisp", {}, r"clisp does not exist, .* Did you mean 'clips'\?"),
        (folder_clips, "f/clips/cat/masks", {}, r"found 0.png, .*Did you mean .*cat\?"),
        (folder_clips, "f", {}, r"found clips, video\. Did you mean .*clips\?"),
        (folder_clips, "f/video", {}, r"found Frame\. Did you mean 'Frame'\?"),
        (vip_clips, "v/VIP", {}, r"expected Images in it, found VIP_Fine\. Did you mean"),
        (vip_clips, fine, {"clips": ["videos21"]}, r"no VIP video 'videos21' .* mean 'videos1'"),
    ):
        with pytest.raises(FrameError, match=message):
            list_them(tmp_path / folder, **options)  # type: ignore[operator]
    for content, message in ((b"\xff\n", "cannot be read as text"), (b"\n", "names no clips")):
        (fine / "lists" / "val_videos.txt").write_bytes(content)
        with pytest.raises(FrameError, match=rf"val_videos\.txt {message}"):
            vip_clips(fine)
    (fine / "Annotations" / "Category_ids").rename(fine / "Annotations" / "Category_id")
    with pytest.raises(FrameError, match=r"expected Annotations/Category_ids .* 'Category_id'\?"):
        vip_clips(fine)


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


def test_a_clip_that_cannot_be_made_tells_why_when_it_is_read() -> None:
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


def test_frames_and_masks_that_do_not_fit(tmp_path: Path) -> None:
    cases = (
        ("", "0.png", r"expected images in .*frames, found nothing"),
        ("0.png", "0.jpg", r"expected PNG masks in .*masks, found 0.jpg"),
        ("0.png 1.png", "0.png 1.png 3.png", r"masks without a frame in .*: 3.png; .* 0.png, 1"),
        ("0.png 1.png", "1.png", r"first frame, 0.png, has no mask; expected .*masks.0.png"),
        ("0.png 1.jpg 1.png", "0.png", r"several files for the same frame, such as 1.jpg;"),
    )
    for number, (frames, masks, message) in enumerate(cases):
        root = tmp_path / str(number)
        for kind, names in (("frames", frames), ("masks", masks)):
            for name in names.split():
                save(root / kind / name, MASK, "L")
        with pytest.raises(FrameError, match=message):
            mask_clip("clip", root / "frames", root / "masks")


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
    for number, (mask, mode) in enumerate(((MASK, "L"), (MASK[:3], "L"), (MASK, "RGB"))):
        save(tmp_path / f"{number}.png", mask, mode)
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
