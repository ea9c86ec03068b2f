from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import JHMDB_JOINTS, Clip, jhmdb_clips, pck

H, W = 24, 32


def positions(frames: int) -> NDArray[np.float64]:
    """pos_img: (2, 15, T), counted from 1; joint 14 is outside the frame."""
    rng = np.random.default_rng(frames)
    found = rng.uniform(2, 22, (2, 15, frames))
    found[:, 14] = [[-3.0], [40.0]]
    found[:, 0] = [[1.0], [1.0]]  # the centre of the first pixel
    return found


def write_clip(root: Path, kind: str, name: str, *, frames: int = 4, poses: int = 4) -> None:
    folder = root / "Rename_Images" / kind / name
    folder.mkdir(parents=True)
    (folder / ".AppleDouble").mkdir()
    for t in range(frames):
        picture = Image.fromarray(np.full((H, W, 3), 10 * t, dtype=np.uint8))
        picture.save(folder / f"{t + 1:05d}.png")
    joints = root / "joint_positions" / kind / name
    joints.mkdir(parents=True)
    content = {"pos_img": positions(poses), "pos_world": positions(poses) / W, "scale": 1.0}
    savemat(joints / "joint_positions.mat", content, do_compression=True)


def write_jhmdb(root: Path) -> Path:
    (root / "splits").mkdir(parents=True)
    for kind, names in {"walk": ["a_walk", "b_walk"], "run": ["c_run"]}.items():
        for name in names:
            write_clip(root, kind, name)
        for split in (1, 2):
            lines = [f"{name}.avi {2 if split == 1 else 1} " for name in names]
            if kind == "walk":
                lines[0] = "a_walk.avi 1 "
            (root / "splits" / f"{kind}_test_split{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_the_official_layout(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path)
    clips = jhmdb_clips(root)
    assert [clip.name for clip in clips] == ["c_run", "b_walk"]
    assert [clip.name for clip in jhmdb_clips(root, subset="train")] == ["a_walk"]
    assert len(jhmdb_clips(root, subset="train", split=2)) == 3
    with pytest.raises(FrameError, match=r"no clip 'a_walk' in .* Did you mean 'b_walk'"):
        jhmdb_clips(root, clips=["a_walk"])
    clip = clips[0]
    assert isinstance(clip, Clip)
    assert len(clip) == 4
    assert clip.annotated == (0, 1, 2, 3)
    assert clip.read_frame(2).shape == (H, W, 3)
    assert clip.read_frame(2)[0, 0, 0] == 20
    joints = clip.read_annotations()
    assert joints.names == JHMDB_JOINTS
    assert joints.xy.shape == (4, 15, 2)
    np.testing.assert_allclose(joints.xy, positions(4).transpose(2, 1, 0) - 0.5)
    np.testing.assert_allclose(joints.xy[:, 0], 0.5)  # a pixel's centre is at a half
    np.testing.assert_array_equal(joints.visible.sum(1), [14] * 4)
    assert not joints.visible[:, 14].any()
    assert pck(joints.xy, joints.xy).mean == {0.1: 1, 0.2: 1}


def test_frames_without_joints_are_left_out(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path)
    write_clip(root, "run", "long_run", frames=9, poses=6)
    with (root / "splits" / "run_test_split1.txt").open("a") as file:
        file.write("long_run.avi 2\n")
    (clip,) = jhmdb_clips(root, clips=["long_run"])
    assert len(clip) == len(clip.annotated) == len(clip.read_annotations().xy) == 6


def test_one_bad_clip_does_not_lose_the_others(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path)
    write_clip(root, "run", "short_run", frames=3, poses=6)
    write_clip(root, "run", "other_run")
    write_clip(root, "run", "broken_run")
    write_clip(root, "run", "unposed_run")
    folder = root / "joint_positions" / "run"
    savemat(folder / "other_run" / "joint_positions.mat", {"pos_img": np.zeros((2, 13, 4))})
    (folder / "broken_run" / "joint_positions.mat").write_bytes(b"MATLAB 5.0" + bytes(300))
    (folder / "unposed_run" / "joint_positions.mat").unlink()
    expected = {
        "c_run": None,
        "short_run": "'short_run': joints for 6 frames, but .* holds 3",
        "other_run": r"'other_run': .*pos_img of shape \(2, 13, 4\), expected \(2, 15, T\)",
        "broken_run": "'broken_run': .*joint_positions.mat cannot be read as a MATLAB file",
        "unposed_run": r"'unposed_run': no .*joint_positions.mat; unpack",
        "absent_run": "'absent_run': no frames: .*absent_run holds nothing",
    }
    lines = [f"{name}.avi 2" for name in expected]
    (root / "splits" / "run_test_split1.txt").write_text("\n".join(lines))
    clips = {clip.name: clip for clip in jhmdb_clips(root)}
    assert clips["c_run"].read_annotations().xy.shape == (4, 15, 2)
    for name, message in expected.items():
        if message is not None:
            for read in (clips[name].read_annotations, lambda clip=clips[name]: clip.read_frame(0)):
                with pytest.raises(FrameError, match=message):
                    read()


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    root = write_jhmdb(tmp_path / "data" / "JHMDB")
    with pytest.raises(FrameError, match=r"found JHMDB\. Did you mean .*JHMDB\?"):
        jhmdb_clips(tmp_path / "data")
    with pytest.raises(FrameError, match=r"Rename_Images is not .* Did you mean .*JHMDB\?"):
        jhmdb_clips(root / "Rename_Images")
    with pytest.raises(ValueError, match="subset='val' and split=1"):
        jhmdb_clips(root, subset="val")  # type: ignore[arg-type]
    with pytest.raises(FrameError, match=r"no lists in .* expected <class>_test_split3.txt, found"):
        jhmdb_clips(root, split=3)
    (root / "splits").rename(root / "lists")
    with pytest.raises(FrameError, match="expected splits in it, found Rename_Images, joint_pos"):
        jhmdb_clips(root)


def write_json_clip(folder: Path, frames: int = 3, *, told: int = 3) -> Path:
    (folder / "frames").mkdir(parents=True)
    for t in range(frames):
        Image.fromarray(np.zeros((H, W, 3), dtype=np.uint8)).save(
            folder / "frames" / f"{t:05d}.jpg"
        )
    rows = [
        {"frame": t, "xy": positions(told)[:, :, t].T.tolist(), "visible": [True] * 15}
        for t in range(told)
    ]
    content = {
        "keypoint_names": JHMDB_JOINTS,
        "width": W,
        "height": H,
        "annotations": rows[::-1],
    }
    (folder / "keypoints.json").write_text(json.dumps(content))
    return folder


def test_clips_with_keypoint_files(tmp_path: Path) -> None:
    folder = write_json_clip(tmp_path / "catch")
    write_json_clip(tmp_path / "throw", frames=5)
    catch, throw = jhmdb_clips(tmp_path)
    assert jhmdb_clips(folder)[0].digest() == catch.digest()
    assert catch.read_annotations().xy == pytest.approx(positions(3).transpose(2, 1, 0) - 0.5)
    with pytest.raises(
        FrameError, match=r"'throw': .* 15 joints of 3 frames, expected .* 5 images"
    ):
        throw.read_annotations()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "is not a keypoint file"),
        ({"annotations": []}, r"shape \(0,\) .*, expected \(A, 15, 2\)"),
        ({"annotations": [{"frame": 0, "xy": [[1, 2]], "visible": [True]}]}, r"shape \(1, 1, 2\)"),
        (
            {"annotations": [{"frame": 0, "xy": [[1, 2]] * 15, "visible": [2] * 15}]},
            "must have true or false for visible",
        ),
    ],
)
def test_keypoint_files_of_another_form(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = write_json_clip(tmp_path / "catch")
    path = folder / "keypoints.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (clip,) = jhmdb_clips(folder)
    with pytest.raises(FrameError, match=rf"'catch': .*keypoints.json .*{message}"):
        clip.read_annotations()
    path.write_text("{")
    with pytest.raises(FrameError, match=r"keypoints.json cannot be read as JSON"):
        jhmdb_clips(folder)[0].read_annotations()
