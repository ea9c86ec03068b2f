from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn import grey, moving_squares, problem_of, write_davis

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import davis_clips, davis_protocol
from cosettle_adapter.video import FrameSelection

MASKS = moving_squares()[1]


def test_the_official_2017_layout(tmp_path: Path) -> None:
    clips = davis_clips(write_davis(tmp_path, {"walk": MASKS, "run": MASKS[::-1]}))
    assert [(clip.name, len(clip), clip.annotated) for clip in clips] == [
        ("walk", 5, (0, 1, 2, 3, 4)), ("run", 5, (0, 1, 2, 3, 4)),
    ]  # fmt: skip
    np.testing.assert_array_equal(clips[0].read_annotations(), MASKS)
    assert grey(clips[1], 3) == 3


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
        (FrameSelection(start=0.5, end=2.0, fps=2.0), ["00001", "00002", "00003"]),
    ],
)
def test_frames_are_chosen(tmp_path: Path, select: FrameSelection, stems: list[str]) -> None:
    (clip,) = davis_clips(write_davis(tmp_path, {"walk": MASKS}), select=select)
    assert [path.stem for path in clip.frames] == stems
    chosen = [int(stem) for stem in stems]
    np.testing.assert_array_equal(clip.read_annotations(), MASKS[chosen])


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("DAVIS/JPEGImages", {}, r"JPEGImages/480p, .* in it, found 480p\. Did you mean .*DAVIS\?"),
        (".", {}, r"found DAVIS\. Did you mean .*DAVIS\?"),
        ("DAVIS/ImageSets/2017/val.txt", {}, "val.txt is a file, expected the folder of DAVIS"),
        ("DAVIS", {"subset": "vall"}, r"no list of clips .* Did you mean 'val.txt'\?"),
        ("DAVIS", {"year": "2016"}, r"no list of clips .*ImageSets.2016.val.txt; found nothing"),
        ("DAVIS", {"clips": ["wlak"]}, r"no DAVIS-2017 clip 'wlak'.* Did you mean 'walk'"),
        ("DAVIS", {"resolution": "48p"}, r"expected JPEGImages/48p, .* Did you mean '480p'"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, folder: str, options: dict[str, str], message: str
) -> None:
    write_davis(tmp_path / "DAVIS", {"walk": MASKS})
    with pytest.raises(FrameError, match=message):
        davis_clips(tmp_path / folder, **options)  # type: ignore[arg-type]


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
