from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import grey, problem_of, save, save_frames
from numpy.typing import NDArray
from scipy.io import savemat

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import BADJA_JOINTS, JHMDB_JOINTS, badja_clips, jhmdb_clips
from cosettle_adapter.evaluation.joint_clips import decode_joints, joint_heat_maps

SIZE = H, W = 24, 32


def positions(frames: int) -> NDArray[np.float64]:
    """pos_img: (2, 15, T), counted from 1; joint 14 is outside the frame."""
    found = np.random.default_rng(frames).uniform(2, 22, (2, 15, frames))
    found[:, 14] = [[-3.0], [40.0]]
    found[:, 0] = [[1.0], [1.0]]  # the centre of the first pixel
    return found


def write_clip(root: Path, kind: str, name: str, *, frames: int = 4, poses: int = 4) -> Path:
    save_frames(root / "Rename_Images" / kind / name, range(1, frames + 1), SIZE, "{:05d}.png")
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


def test_the_official_layout_of_jhmdb(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path)
    assert len(jhmdb_clips(root, split=2)) == 3
    clips = jhmdb_clips(root)
    assert [clip.name for clip in clips] == ["c_run", "b_walk"]
    assert (clips[0].annotated, grey(clips[0], 2)) == ((0, 1, 2, 3), 3)
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


def write_images(davis: Path, *, masks: str = "P", resolution: str = "Full-Resolution") -> None:
    """The animal fills 10 t pixels of frame t."""
    frames, labels = (davis / kind / resolution / "dog" for kind in ("JPEGImages", "Annotations"))
    save_frames(frames, range(2, 13), SIZE, "{:05d}.jpg")
    for t in range(2, 13):
        mask = np.zeros(SIZE, dtype=np.uint8)
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
def test_the_official_layout_of_badja(tmp_path: Path, masks: str) -> None:
    write_images(tmp_path / "downloads" / "DAVIS", masks=masks)
    root = write_badja(tmp_path / "BADJA")
    assert "BADJA clip 'dog': 6 of its files are missing" in problem_of(badja_clips(root)[0])
    (clip,) = badja_clips(root, davis=tmp_path / "downloads" / "DAVIS")
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


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    write_images(write_badja(tmp_path) / "DAVIS")
    for content, message in (
        ("[]", r"ValueError: joints of shape \(0,\)"),
        ([{"image_path": "a"}], "is not a list of objects .*KeyError: 'segmentation_path'"),
        (rows(image_path="/etc/passwd"), "/etc/passwd leads out of the folder of BADJA"),
        (rows(segmentation_path="../../x.jpg"), "leads out of the folder"),
        (rows((20,)), r"2 of its files are missing: .*00020.jpg"),
        (rows((11, 3)), "are not in order"),
        (rows(joints=[[1, 2]] * 5), r"joints of shape \(3, 5, 2\)"),
        ("[{", "is not a list of objects .*JSONDecodeError"),
    ):
        good, wrong = badja_clips(write_badja(tmp_path, content, "wrong"))
        assert good.read_annotations().xy.shape == (3, 20, 2)
        assert re.search(f"BADJA clip 'wrong': .*{message}", problem_of(wrong))


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    badja, jhmdb = write_badja(tmp_path / "1" / "BADJA"), write_jhmdb(tmp_path / "2" / "JHMDB")
    for listed, arguments, options, message in (
        (badja_clips, tmp_path / "1", {}, r"found BADJA\. Did you mean .*BADJA\?"),
        (badja_clips, badja, {"clips": ["dgo"]}, "no BADJA clip 'dgo' in .* Did you mean 'dog'"),
        (badja_clips, badja, {"davis": tmp_path / "3"}, "3 does not exist, expected the folder of"),
        (jhmdb_clips, tmp_path / "2", {}, r"found JHMDB\. Did you mean .*JHMDB\?"),
        (jhmdb_clips, jhmdb / "Rename_Images", {}, r"Rename_Images is not .* mean .*JHMDB\?"),
        (jhmdb_clips, jhmdb, {"clips": ["a_walk"]}, "no JHMDB clip 'a_walk' in .* mean 'b_walk'"),
        (jhmdb_clips, jhmdb, {"split": 3}, "no lists in .* expected <class>_test_split3.txt, foun"),
    ):
        with pytest.raises(FrameError, match=message):
            listed(arguments, **options)  # type: ignore[operator]
    (jhmdb / "splits").rename(jhmdb / "lists")
    with pytest.raises(FrameError, match="expected splits in it, found Rename_Images, joint_pos"):
        jhmdb_clips(jhmdb)


def write_json_clip(folder: Path, frames: int = 3, **changes: Any) -> Path:
    save_frames(folder / "frames", range(frames), SIZE, "{:05d}.jpg")
    annotations = [
        {"frame": t, "xy": positions(3)[:, :, t].T.tolist(), "visible": [True] * 15}
        for t in (2, 1, 0)
    ]
    content = {"keypoint_names": JHMDB_JOINTS, "width": W, "height": H, "annotations": annotations}
    (folder / "keypoints.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_clips_with_keypoint_files(tmp_path: Path) -> None:
    folder = write_json_clip(tmp_path / "catch")
    write_json_clip(tmp_path / "throw", frames=5)
    catch, throw = jhmdb_clips(tmp_path)
    assert jhmdb_clips(folder)[0].digest() == catch.digest()
    assert catch.read_annotations().xy == pytest.approx(positions(3).transpose(2, 1, 0) - 0.5)
    assert "JHMDB clip 'throw': joints for 3 frames, but" in problem_of(throw)


def test_keypoint_files_beside_davis(tmp_path: Path) -> None:
    write_images(tmp_path / "badja" / "DAVIS", resolution="480p")
    annotations = [
        {"frame": t, "xy": [[t, 4], [8, 6]], "visible": [True, t != 5]} for t in (5, 2, 9)
    ]
    content = {"keypoint_names": ["nose", "jaw"], "width": W // 2, "annotations": annotations}
    write_json_clip(tmp_path / "badja" / "dog", **content)
    (clip,) = badja_clips(tmp_path / "badja", davis=tmp_path / "badja" / "DAVIS")
    assert [frame.stem for frame in clip.frames] == [f"{t:05d}" for t in range(2, 10)]
    assert clip.annotated == (0, 3, 7)
    joints = clip.read_annotations()
    np.testing.assert_allclose(joints.xy[:, 0], [[4, 4], [10, 4], [18, 4]])  # twice as wide
    np.testing.assert_array_equal(joints.visible[:, 1], [True, False, True])
    assert joints.areas == pytest.approx([20, 50, 90])


ROW = {"frame": 0, "xy": [[1, 2]] * 15, "visible": [True] * 15}


def test_keypoint_files_of_another_form(tmp_path: Path) -> None:
    for changes, message in (
        ({"width": None}, "is not a keypoint file .TypeError"),
        ({"annotations": []}, r"xy of shape \(0,\)"),
        ({"annotations": [{**ROW, "xy": [[1, 2]]}]}, r"xy of shape \(1, 1, 2\)"),
        ({"annotations": [{**ROW, "visible": [2] * 15}]}, r"visible int64 \(1, 15\)"),
        ({"annotations": [ROW, ROW]}, "a frame occurs twice"),
        ({"annotations": [{**ROW, "frame": 1}]}, "must have JHMDB's 15 joints, for every frame"),
    ):
        (clip,) = jhmdb_clips(write_json_clip(tmp_path / "catch", **changes))
        assert re.search(rf"'catch': .*keypoints.json .*{message}", problem_of(clip))


def test_heat_maps_are_gaussians_of_half_a_patch_and_may_be_empty() -> None:
    joints = torch.tensor([[1.0, 1.0], [2.3, 9.8], [5.5, 4.25]])
    places, found = decode_joints(joint_heat_maps(joints, (8, 12)))
    assert found.all()
    assert float((places - joints).abs().max()) < 0.2
    heat = joint_heat_maps(torch.tensor([[2.0, 3.0]]), (5, 7))[0]
    assert heat[2, 3] == 1
    assert heat[2:4, 4].tolist() == pytest.approx([np.exp(-2), np.exp(-4)])
    for outside, found in ((-1.0, True), (-2.5, False)):
        assert decode_joints(joint_heat_maps(torch.tensor([[outside, 3.0]]), (5, 7)))[1] == found
    weighed = torch.zeros(1, 4, 5)
    weighed[0, 1, 1], weighed[0, 1, 3] = 3.0, 1.0
    torch.testing.assert_close(decode_joints(weighed)[0], torch.tensor([[1.0, 1.5]]))
    places, found = decode_joints(torch.zeros(2, 3, 4, 5))
    assert not found.any()
    assert torch.isfinite(places).all()
