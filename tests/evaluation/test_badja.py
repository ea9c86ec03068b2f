from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import grey, problem_of, save, save_frames

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import (
    BADJA_JOINTS,
    Clip,
    Joints,
    badja_accuracy,
    badja_clips,
    badja_protocol,
)
from cosettle_adapter.video.geometry import plan_geometry

from helpers import shared_data

H, W = 18, 32


def write_images(davis: Path, *, masks: str = "P", resolution: str = "Full-Resolution") -> None:
    """The animal fills 10 t pixels of frame t."""
    frames, labels = (davis / kind / resolution / "dog" for kind in ("JPEGImages", "Annotations"))
    save_frames(frames, range(2, 13), (H, W), "{:05d}.jpg")
    for t in range(2, 13):
        mask = np.zeros((H, W), dtype=np.uint8)
        mask[:10, :t] = 1 if masks == "P" else 255
        save(labels / f"{t:05d}.png", mask, masks)


def rows(frames: tuple[int, ...] = (3, 8, 11), **changes: Any) -> list[dict[str, Any]]:
    found = []
    for t in frames:
        visible = [joint in BADJA_JOINTS.values() for joint in range(37)]
        visible[8] = t != 8
        row = {
            "image_path": f"DAVIS/JPEGImages/Full-Resolution/dog/{t:05d}.jpg",
            "segmentation_path": f"DAVIS/Annotations/Full-Resolution/dog/{t:05d}.png",
            "joints": [[joint, 2 * joint + t] for joint in range(37)],  # (row, col)
            "visibility": visible,
        }
        found.append(row | changes)
    return found


def write_badja(root: Path, content: Any = None, name: str = "dog") -> Path:
    path = root / "joint_annotations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content or rows()))
    return root


@pytest.mark.parametrize("masks", ["P", "L", "RGB"])
def test_the_official_layout(tmp_path: Path, masks: str) -> None:
    write_images(tmp_path / "DAVIS", masks=masks)
    (clip,) = badja_clips(write_badja(tmp_path))
    # all frames from the first annotated to the last
    assert [frame.stem for frame in clip.frames] == [f"{t:05d}" for t in range(3, 12)]
    assert (clip.name, clip.annotated, grey(clip, 0)) == ("dog", (0, 5, 8), 3)
    joints = clip.read_annotations()
    assert joints.xy.shape == (3, 20, 2)
    nose = joints.names.index("nose")
    np.testing.assert_array_equal(joints.xy[1, nose], [2 * 33 + 8, 33])  # (col, row) is (x, y)
    assert joints.visible.sum() == 3 * 20 - 1
    assert not joints.visible[1, 0]
    assert joints.areas == pytest.approx([30, 80, 110])
    assert badja_accuracy(joints.xy, joints.xy, joints.visible, joints.areas) == (1.0, 1.0, 39)


def test_davis_may_be_elsewhere(tmp_path: Path) -> None:
    write_images(tmp_path / "downloads" / "DAVIS")
    root = write_badja(tmp_path / "BADJA")
    assert "BADJA clip 'dog': 6 of its files are missing" in problem_of(badja_clips(root)[0])
    assert len(badja_clips(root, davis=tmp_path / "downloads" / "DAVIS")[0]) == 9
    with pytest.raises(FrameError, match=r"DAVSI does not exist, .* Did you mean 'DAVIS'"):
        badja_clips(root, davis=tmp_path / "downloads" / "DAVSI")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"ValueError: joints of shape \(0,\)"),
        ([{"image_path": "a"}], "is not a list of objects .*KeyError: 'segmentation_path'"),
        (rows(image_path="/etc/passwd"), "/etc/passwd leads out of the folder of BADJA"),
        (rows(segmentation_path="../../x.jpg"), "leads out of the folder"),
        (rows((20,)), r"2 of its files are missing: .*00020.jpg"),
        (rows((11, 3)), "are not in order"),
        (rows(joints=[[1, 2]] * 5), r"joints of shape \(3, 5, 2\)"),
        ("[{", "cannot be read as JSON"),
    ],
)
def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path, content: Any, message: str) -> None:
    write_images(tmp_path / "DAVIS")
    good, wrong = badja_clips(write_badja(write_badja(tmp_path), content, "wrong"))
    assert good.read_annotations().xy.shape == (3, 20, 2)
    assert re.search(f"BADJA clip 'wrong': .*{message}", problem_of(wrong))


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    root = write_badja(tmp_path / "BADJA")
    with pytest.raises(FrameError, match=r"found BADJA\. Did you mean .*BADJA\?"):
        badja_clips(tmp_path)
    with pytest.raises(FrameError, match=r"no BADJA clip 'dgo' in .* Did you mean 'dog'\?"):
        badja_clips(root, clips=["dgo"])


def test_keypoint_files_beside_davis(tmp_path: Path) -> None:
    write_images(tmp_path / "DAVIS", resolution="480p")
    annotations = [
        {"frame": t, "xy": [[t, 4], [8, 6]], "visible": [True, t != 5]} for t in (5, 2, 9)
    ]
    size = {"width": W // 2, "height": H}
    content = {"keypoint_names": ["nose", "jaw"], **size, "annotations": annotations}
    (tmp_path / "badja" / "dog").mkdir(parents=True)
    (tmp_path / "badja" / "dog" / "keypoints.json").write_text(json.dumps(content))
    (clip,) = badja_clips(tmp_path / "badja", davis=tmp_path / "DAVIS")
    assert [frame.stem for frame in clip.frames] == [f"{t:05d}" for t in range(2, 10)]
    assert clip.annotated == (0, 3, 7)
    joints = clip.read_annotations()
    np.testing.assert_allclose(joints.xy[:, 0], [[4, 4], [10, 4], [18, 4]])  # twice as wide
    np.testing.assert_array_equal(joints.visible[:, 1], [True, False, True])
    assert joints.areas == pytest.approx([20, 50, 90])
    (tmp_path / "DAVIS").rename(tmp_path / "badja" / "DAVIS")
    assert len(badja_clips(tmp_path / "badja")[0]) == 8


def test_a_joint_counts_after_the_frame_that_it_is_asked_for_in() -> None:
    geometry = plan_geometry(64, 96, patch=16)
    features = torch.randn(4, 32, 4, 6, generator=torch.Generator().manual_seed(0))
    xy = np.full((4, 2, 2), 40.0)
    visible = np.array([[True, False], [True, False], [True, True], [True, True]])
    joints = Joints(("a", "b"), xy, visible, np.full(4, 25.0))
    clip = Clip("clip", [None] * 4, lambda: joints, (0, 1, 2, 3))
    scores = badja_protocol(Path()).score(clip, features, geometry, None)
    assert scores.values == {"delta_seg": 0, "delta_3px": 0}, "only the queries are where they were"


@pytest.mark.shared
def test_the_development_clips_are_read() -> None:
    clips = badja_clips(shared_data() / "badja", davis=shared_data() / "davis_dev")
    assert [clip.name for clip in clips] == ["cows", "dog", "horsejump-high"]
    for clip in clips:
        joints = clip.read_annotations()
        assert joints.xy.shape == (len(clip.annotated), 20, 2)
        assert clip.annotated[0] == 0
        assert clip.annotated[-1] == len(clip) - 1
        # visible joints are on or near the animal
        assert (joints.xy[joints.visible] >= 0).all()
        assert (joints.xy[joints.visible] <= [854, 480]).all()
        assert joints.areas is not None
        assert all(0.01 < area / (480 * 854) < 0.5 for area in joints.areas)
