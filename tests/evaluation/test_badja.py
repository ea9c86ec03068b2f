from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import BADJA_JOINTS, Clip, badja_accuracy, badja_clips

from helpers import shared_data

H, W = 18, 32
FULL = "DAVIS/{}/Full-Resolution/dog/{:05d}.{}"


def write_images(root: Path, *, first: int = 2, last: int = 12, masks: str = "P") -> None:
    for t in range(first, last + 1):
        frame = root / FULL.format("JPEGImages", t, "jpg")
        frame.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((H, W, 3), 10 * t, dtype=np.uint8)).save(frame, quality=100)
        mask = np.zeros((H, W), dtype=np.uint8)
        mask[:10, :t] = 1 if masks == "P" else 255
        path = root / FULL.format("Annotations", t, "png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(mask, mode="P" if masks == "P" else "L")
        if masks == "P":
            image.putpalette([0, 0, 0, 0, 200, 0])
        image.convert(masks).save(path)


def rows(frames: tuple[int, ...] = (3, 8, 11)) -> list[dict[str, Any]]:
    found = []
    for t in frames:
        joints = [[joint, 2 * joint + t] for joint in range(37)]  # (row, col)
        visible = [joint in BADJA_JOINTS.values() for joint in range(37)]
        visible[8] = t != 8
        found.append(
            {
                "image_path": FULL.format("JPEGImages", t, "jpg"),
                "segmentation_path": FULL.format("Annotations", t, "png"),
                "joints": joints,
                "visibility": visible,
            }
        )
    return found


def write_badja(root: Path, content: Any = None, name: str = "dog") -> Path:
    (root / "joint_annotations").mkdir(parents=True, exist_ok=True)
    path = root / "joint_annotations" / f"{name}.json"
    path.write_text(json.dumps(rows() if content is None else content))
    return root


@pytest.mark.parametrize("masks", ["P", "L", "RGB"])
def test_the_official_layout(tmp_path: Path, masks: str) -> None:
    write_images(tmp_path, masks=masks)
    (clip,) = badja_clips(write_badja(tmp_path))
    assert isinstance(clip, Clip)
    assert clip.name == "dog"
    # all frames from the first annotated to the last
    assert [frame.stem for frame in clip.frames] == [f"{t:05d}" for t in range(3, 12)]
    assert clip.annotated == (0, 5, 8)
    assert abs(int(clip.read_frame(0)[0, 0, 0]) - 30) <= 2
    joints = clip.read_annotations()
    assert joints.xy.shape == (3, 20, 2)
    nose = joints.names.index("nose")
    np.testing.assert_array_equal(joints.xy[1, nose], [2 * 33 + 8, 33])  # (col, row) is (x, y)
    assert joints.visible.sum() == 3 * 20 - 1
    assert not joints.visible[1, 0]
    np.testing.assert_allclose(clip.read_annotations().areas, [30, 80, 110])
    score = badja_accuracy(joints.xy, joints.xy, joints.visible, clip.read_annotations().areas)
    assert score == (1.0, 1.0, 39)


def test_davis_may_be_elsewhere(tmp_path: Path) -> None:
    write_images(tmp_path / "downloads")
    root = write_badja(tmp_path / "BADJA")
    with pytest.raises(FrameError, match=r"'dog': 6 of its files are missing: .*00003.jpg.*davis="):
        badja_clips(root)[0].read_annotations()
    (clip,) = badja_clips(root, davis=tmp_path / "downloads" / "DAVIS")
    assert len(clip) == 9
    with pytest.raises(FrameError, match=r"DAVSI does not exist, .* Did you mean 'DAVIS'"):
        badja_clips(root, davis=tmp_path / "downloads" / "DAVSI")


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_badja(tmp_path)
    write_badja(tmp_path, [], "empty")
    write_badja(tmp_path, [{"image_path": "a"}], "foreign")
    write_badja(tmp_path, [{**row, "image_path": "/etc/passwd"} for row in rows()], "outside")
    write_badja(tmp_path, [{**row, "image_path": "../../x.jpg"} for row in rows()], "upwards")
    write_badja(tmp_path, rows((20,)), "tiger")
    write_badja(tmp_path, rows((11, 3)), "backwards")
    (tmp_path / "joint_annotations" / "broken.json").write_text("[{")
    clips = {clip.name: clip for clip in badja_clips(tmp_path)}
    assert clips.pop("dog").read_annotations().xy.shape == (3, 20, 2)
    expected = {
        "empty": "is not a list of objects with image_path, joints",
        "foreign": "is not a list of objects",
        "outside": "/etc/passwd leads out of the folder of BADJA",
        "upwards": "leads out of the folder",
        "tiger": r"2 of its files are missing: .*00020.jpg",
        "backwards": "are not in order",
        "broken": "cannot be read as JSON",
    }
    assert set(clips) == set(expected)
    for name, message in expected.items():
        clip = clips[name]
        for read in (clip.read_annotations, lambda clip=clip: clip.read_frame(0)):
            with pytest.raises(FrameError, match=rf"BADJA clip '{name}': .*{message}"):
                read()
    few = [{**row, "joints": row["joints"][:5]} for row in rows()]
    write_badja(tmp_path, few, "few")
    with pytest.raises(FrameError, match=r"joints of shape \(3, 5, 2\) .* expected \(3, 37, 2\)"):
        badja_clips(tmp_path, clips=["few"])[0].read_annotations()


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    write_images(tmp_path / "BADJA")
    root = write_badja(tmp_path / "BADJA")
    with pytest.raises(FrameError, match=r"found BADJA\. Did you mean .*BADJA\?"):
        badja_clips(tmp_path)
    with pytest.raises(FrameError, match=r"no clip 'dgo' in .* Did you mean 'dog'\?"):
        badja_clips(root, clips=["dgo"])


def write_keypoints(root: Path, name: str = "dog") -> Path:
    (root / name).mkdir(parents=True)
    annotations = [
        {"frame": t, "xy": [[t, 4], [8, 6]], "visible": [True, t != 5]} for t in (5, 2, 9)
    ]
    content = {
        "keypoint_names": ["nose", "jaw"],
        "width": W // 2,
        "height": H // 2,
        "annotations": annotations,
    }
    (root / name / "keypoints.json").write_text(json.dumps(content))
    return root


def test_keypoint_files_beside_davis(tmp_path: Path) -> None:
    write_images(tmp_path)
    davis = tmp_path / "DAVIS"
    for kind in ("JPEGImages", "Annotations"):
        (davis / kind / "Full-Resolution").rename(davis / kind / "480p")
    root = write_keypoints(tmp_path / "badja")
    (clip,) = badja_clips(root)
    assert [frame.stem for frame in clip.frames] == [f"{t:05d}" for t in range(2, 10)]
    assert clip.annotated == (0, 3, 7)
    joints = clip.read_annotations()
    np.testing.assert_allclose(joints.xy[:, 0], [[4, 8], [10, 8], [18, 8]])  # twice the size
    np.testing.assert_array_equal(joints.visible[:, 1], [True, False, True])
    np.testing.assert_allclose(clip.read_annotations().areas, [20, 50, 90])
    davis.rename(root / "DAVIS")
    assert len(badja_clips(root)[0]) == 8
    (tmp_path / "other" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(FrameError, match=r"found 2 folders of DAVIS .*pass davis="):
        badja_clips(root)
    with pytest.raises(FrameError, match=r"'dog': 6 of its files are missing"):
        badja_clips(root, davis=tmp_path / "other")[0].read_annotations()


@pytest.mark.shared
def test_the_development_clips_are_read() -> None:
    clips = badja_clips(shared_data() / "badja", davis=shared_data() / "davis_dev")
    assert [clip.name for clip in clips] == ["cows", "dog", "horsejump-high"]
    for clip in clips:
        joints = clip.read_annotations()
        areas = joints.areas
        assert joints.xy.shape == (len(clip.annotated), 20, 2)
        assert len(areas) == len(clip.annotated)
        assert clip.annotated[0] == 0
        assert clip.annotated[-1] == len(clip) - 1
        # visible joints are on or near the animal
        assert (joints.xy[joints.visible] >= 0).all()
        assert (joints.xy[joints.visible] <= [854, 480]).all()
        assert all(0.01 < area / (480 * 854) < 0.5 for area in areas)
        still = np.broadcast_to(joints.xy[:1], joints.xy.shape)
        asked = joints.visible & joints.visible[:1]
        score = badja_accuracy(joints.xy, still, asked, areas)
        assert 0 <= score.delta_3px <= score.delta_seg < 1
        assert not math.isnan(score.delta_seg)
