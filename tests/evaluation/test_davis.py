from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_segmentation import moving_squares

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import Clip, davis_clips, davis_protocol
from cosettle_adapter.video import FrameSelection


def write_davis(root: Path, clips: dict[str, NDArray[np.uint8]], *, year: str = "2017") -> Path:
    for name, masks in clips.items():
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for t, mask in enumerate(masks):
            frame = Image.fromarray(np.full((*mask.shape, 3), t, dtype=np.uint8))
            frame.save(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg")
            palette = Image.fromarray(mask, mode="P")
            palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            palette.save(root / "Annotations" / "480p" / name / f"{t:05d}.png")
    (root / "ImageSets" / year).mkdir(parents=True)
    (root / "ImageSets" / year / "val.txt").write_text("\n".join(clips) + "\n")
    return root


def test_the_official_2017_layout(tmp_path: Path) -> None:
    _, masks = moving_squares()
    root = write_davis(tmp_path, {"walk": masks, "run": masks[::-1]})
    sequences = davis_clips(root)
    assert [sequence.name for sequence in sequences] == ["walk", "run"]
    np.testing.assert_array_equal(sequences[0].read_annotations(), masks)
    assert all(isinstance(sequence, Clip) and len(sequence) == 5 for sequence in sequences)
    assert sequences[1].read_frame(3).shape == (48, 80, 3)
    assert abs(int(sequences[1].read_frame(3).mean()) - 3) <= 1


def test_the_2016_layout_merges_objects(tmp_path: Path) -> None:
    _, masks = moving_squares()
    masks[masks == 2] = 255  # the 2016 release draws its one object in white
    root = write_davis(tmp_path, {"walk": masks}, year="480p")
    lists = root / "ImageSets" / "480p"
    lines = [f"/JPEGImages/480p/walk/{t:05d}.jpg /Annotations/480p/walk/x.png" for t in range(5)]
    (lists / "val.txt").write_text("\n".join(lines))
    (lists / "val.txt").rename(lists / "train.txt")  # the list of train alone
    (clip,) = davis_clips(root)
    assert clip.name == "walk"
    np.testing.assert_array_equal(clip.read_annotations(), (masks > 0) * 1)


def test_several_folders_are_parts_of_one_evaluation(tmp_path: Path) -> None:
    masks = moving_squares()[1]
    one = write_davis(tmp_path / "one", {"walk": masks, "run": masks})
    two = write_davis(tmp_path / "two", {"walk": masks})
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


def test_frames_are_chosen_by_a_selection(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    for select, stems in (
        (FrameSelection(every=2, max_frames=2), ["00000", "00002"]),
        (FrameSelection(start=0.5, end=2.0, fps=2.0), ["00001", "00002", "00003"]),
    ):
        (clip,) = davis_clips(root, select=select)
        assert [path.stem for path in clip.frames] == stems
        assert len(clip.read_annotations()) == len(clip.annotated) == len(stems)


def test_files_are_found_whatever_their_suffix(tmp_path: Path) -> None:
    masks = moving_squares()[1]
    root = write_davis(tmp_path, {"walk": masks})
    frames, labels = (root / kind / "480p" / "walk" for kind in ("JPEGImages", "Annotations"))
    for number, suffix in enumerate((".jpeg", ".JPG", ".webp", ".PNG")):
        with Image.open(frames / f"{number:05d}.jpg") as picture:
            picture.load()
        (frames / f"{number:05d}.jpg").unlink()
        picture.save(frames / f"{number:05d}{suffix}")
    (labels / "00001.png").rename(labels / "00001.PNG")
    (frames / "._00001.jpg").write_bytes(b"what macOS keeps beside a file")
    (clip,) = davis_clips(root)
    assert len(clip) == 5
    assert clip.read_frame(3).shape == (48, 80, 3)
    np.testing.assert_array_equal(clip.read_annotations(), masks)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FrameError, match="expected JPEGImages, Annotations, ImageSets in it, found"
    ):
        davis_clips(tmp_path)
    root = write_davis(tmp_path / "DAVIS", {"walk": moving_squares()[1]})
    with pytest.raises(FrameError, match=r"found DAVIS\. Did you mean .*DAVIS\?"):
        davis_clips(tmp_path)
    with pytest.raises(FrameError, match=r"DAVSI does not exist, .* Did you mean 'DAVIS'\?"):
        davis_clips(tmp_path / "DAVSI")
    with pytest.raises(FrameError, match=r"val.txt is a file, expected the folder of DAVIS"):
        davis_clips(root / "ImageSets" / "2017" / "val.txt")
    with pytest.raises(FrameError, match=r"no DAVIS-2017 train list in .*train.txt"):
        davis_clips(root, subset="train")
    with pytest.raises(FrameError, match=r"no DAVIS-2017 vall list in .* Did you mean 'val'\?"):
        davis_clips(root, subset="vall")
    with pytest.raises(FrameError, match=r"expected .*ImageSets.2016.val.txt or"):
        davis_clips(root, year="2016")
    with pytest.raises(FrameError, match=r"no clip 'wlak'.* Did you mean 'walk'"):
        davis_clips(root, clips=["wlak"])
    with pytest.raises(FrameError, match=r"no '1080p' folder in .*JPEGImages.* '480p'"):
        davis_clips(root, resolution="1080p")


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    masks = moving_squares()[1]
    root = write_davis(tmp_path, {"run": masks, "walk": masks, "gone": masks})
    (root / "Annotations" / "480p" / "walk" / "00003.png").unlink()
    shutil.rmtree(root / "JPEGImages" / "480p" / "gone")
    good, unannotated, gone = davis_clips(root)
    assert good.problem is None
    assert good.read_annotations().shape == masks.shape
    for read in (unannotated.read_annotations, lambda: unannotated.read_frame(0)):
        with pytest.raises(FrameError, match=r"'walk' is not complete: no .*00003.png"):
            read()
    assert len(gone) == 0
    with pytest.raises(FrameError, match=r"'gone' is not complete: no .*gone.\*.jpg"):
        gone.read_annotations()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    (root / "JPEGImages" / "480p" / "walk" / "00001.jpg").write_bytes(b"not a picture")
    (root / "Annotations" / "480p" / "walk" / "00002.png").write_bytes(b"not a picture")
    clip = davis_clips(root)[0]
    assert clip.read_frame(0).dtype == np.uint8
    with pytest.raises(FrameError, match=r"00001.jpg cannot be read as an image"):
        clip.read_frame(1)
    with pytest.raises(FrameError, match=r"00002.png cannot be read as a mask"):
        clip.read_annotations()


def test_masks_of_another_kind_are_refused(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {"walk": moving_squares()[1]})
    path = root / "Annotations" / "480p" / "walk" / "00001.png"
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(path)
    with pytest.raises(FrameError, match=r"00001.png is 9 x 9, but .* 48 x 80"):
        davis_clips(root)[0].read_annotations()
    Image.fromarray(np.zeros((48, 80, 3), dtype=np.uint8)).save(path)
    with pytest.raises(FrameError, match=r"00001.png is a RGB image, expected a palette"):
        davis_clips(root)[0].read_annotations()
