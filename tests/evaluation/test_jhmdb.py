from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import grey, problem_of, save_frames
from numpy.typing import NDArray
from scipy.io import savemat

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import JHMDB_JOINTS, jhmdb_clips

SIZE = (24, 32)


def positions(frames: int) -> NDArray[np.float64]:
    """pos_img: (2, 15, T), counted from 1; joint 14 is outside the frame."""
    found = np.random.default_rng(frames).uniform(2, 22, (2, 15, frames))
    found[:, 14] = [[-3.0], [40.0]]
    found[:, 0] = [[1.0], [1.0]]  # the centre of the first pixel
    return found


def write_clip(root: Path, kind: str, name: str, *, frames: int = 4, poses: int = 4) -> Path:
    folder = root / "Rename_Images" / kind / name
    save_frames(folder, range(1, frames + 1), SIZE, "{:05d}.png")
    (folder / ".AppleDouble").mkdir()
    path = root / "joint_positions" / kind / name / "joint_positions.mat"
    path.parent.mkdir(parents=True)
    savemat(path, {"pos_img": positions(poses), "scale": 1.0}, do_compression=True)
    return path


def write_jhmdb(root: Path) -> Path:
    (root / "splits").mkdir(parents=True)
    lists = {"walk": "a_walk.avi 1 \nb_walk.avi 2 \n\n", "run": "c_run.avi 2\n"}
    for kind, lines in lists.items():
        for line in filter(None, lines.splitlines()):
            write_clip(root, kind, line.split(".")[0])
        (root / "splits" / f"{kind}_test_split1.txt").write_text(lines)
        (root / "splits" / f"{kind}_test_split2.txt").write_text(lines.replace("1", "2"))
    return root


def test_the_official_layout(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path)
    assert len(jhmdb_clips(root, split=2)) == 3
    clips = jhmdb_clips(root)
    assert [(clip.name, clip.annotated) for clip in clips] == [
        ("c_run", (0, 1, 2, 3)), ("b_walk", (0, 1, 2, 3)),
    ]  # fmt: skip
    assert grey(clips[0], 2) == 3
    joints = clips[0].read_annotations()
    assert joints.names == JHMDB_JOINTS
    np.testing.assert_allclose(joints.xy, positions(4).transpose(2, 1, 0) - 0.5)
    np.testing.assert_allclose(joints.xy[:, 0], 0.5)  # a pixel's centre is at a half
    assert joints.visible[:, :14].all()
    assert not joints.visible[:, 14].any()


def test_frames_without_joints_are_left_out_and_bad_clips_are_told(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path)
    write_clip(root, "run", "long_run", frames=9, poses=6)
    write_clip(root, "run", "short_run", frames=3, poses=6)
    savemat(write_clip(root, "run", "other_run"), {"pos_img": np.zeros((2, 13, 4))})
    write_clip(root, "run", "broken_run").write_bytes(b"MATLAB 5.0" + bytes(300))
    expected = {
        "short_run": "'short_run': joints for 6 frames, but .* holds 3",
        "other_run": r"'other_run': .*pos_img of shape \(2, 13, 4\), expected \(2, 15, T\)",
        "broken_run": "'broken_run': .*joint_positions.mat cannot be read as a MATLAB file",
        "absent_run": r"'absent_run': no .*joint_positions.mat; unpack",
    }
    lines = [f"{name}.avi 2" for name in ("long_run", *expected)]
    (root / "splits" / "run_test_split1.txt").write_text("\n".join(lines))
    long, *bad, _ = jhmdb_clips(root)
    assert len(long) == len(long.annotated) == len(long.read_annotations().xy) == 6
    for clip, message in zip(bad, expected.values(), strict=True):
        assert re.search(f"JHMDB clip {message}", problem_of(clip))


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path / "data" / "JHMDB")
    with pytest.raises(FrameError, match=r"found JHMDB\. Did you mean .*JHMDB\?"):
        jhmdb_clips(tmp_path / "data")
    with pytest.raises(FrameError, match=r"Rename_Images is not .* Did you mean .*JHMDB\?"):
        jhmdb_clips(root / "Rename_Images")
    with pytest.raises(FrameError, match=r"no JHMDB clip 'a_walk' in .* Did you mean 'b_walk'"):
        jhmdb_clips(root, clips=["a_walk"])
    with pytest.raises(FrameError, match=r"no lists in .* expected <class>_test_split3.txt, found"):
        jhmdb_clips(root, split=3)
    (root / "splits").rename(root / "lists")
    with pytest.raises(FrameError, match="expected splits in it, found Rename_Images, joint_pos"):
        jhmdb_clips(root)


def write_json_clip(folder: Path, frames: int = 3, **changes: Any) -> Path:
    save_frames(folder / "frames", range(frames), SIZE, "{:05d}.jpg")
    rows = [
        {"frame": t, "xy": positions(3)[:, :, t].T.tolist(), "visible": [True] * 15}
        for t in (2, 1, 0)
    ]
    content = {"keypoint_names": JHMDB_JOINTS, "width": 32, "height": 24, "annotations": rows}
    (folder / "keypoints.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_clips_with_keypoint_files(tmp_path: Path) -> None:
    folder = write_json_clip(tmp_path / "catch")
    write_json_clip(tmp_path / "throw", frames=5)
    catch, throw = jhmdb_clips(tmp_path)
    assert jhmdb_clips(folder)[0].digest() == catch.digest()
    assert catch.read_annotations().xy == pytest.approx(positions(3).transpose(2, 1, 0) - 0.5)
    assert "JHMDB clip 'throw': joints for 3 frames, but" in problem_of(throw)


ROW = {"frame": 0, "xy": [[1, 2]] * 15, "visible": [True] * 15}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": None}, "is not a keypoint file .TypeError"),
        ({"annotations": []}, r"xy of shape \(0,\)"),
        ({"annotations": [{**ROW, "xy": [[1, 2]]}]}, r"xy of shape \(1, 1, 2\)"),
        ({"annotations": [{**ROW, "visible": [2] * 15}]}, "visible that is not true or false"),
        ({"annotations": [ROW, ROW]}, "a frame that is there twice"),
        ({"annotations": [{**ROW, "frame": 1}]}, "must have JHMDB's 15 joints, for every frame"),
    ],
)
def test_keypoint_files_of_another_form(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = write_json_clip(tmp_path / "catch", **changes)
    assert re.search(rf"'catch': .*keypoints.json .*{message}", problem_of(jhmdb_clips(folder)[0]))
    (folder / "keypoints.json").write_text("{")
    assert "keypoints.json cannot be read as JSON" in problem_of(jhmdb_clips(folder)[0])
