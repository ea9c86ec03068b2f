"""Every task with features that know the answer, and with features that know nothing.

Labels go to the single best cell (``topk=1``): the protocols' averages blur even perfect matches.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_joints_and_tracking import drifting
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.datasets import Joints
from cosettle_adapter.evaluation.tasks import Badja, Davis, Folder, Jhmdb, TapVid, Task, Vip
from cosettle_adapter.video.geometry import plan_geometry

FRAMES, CELL, H, W = 5, 16, 8, 12
GEOMETRY = plan_geometry(H * CELL, W * CELL, patch=CELL)
KNOWS = drifting(FRAMES, H, W)
KNOWS_NOTHING = torch.randn(FRAMES, 32, H, W, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip whose content moves one cell to the right a frame, with any annotation."""

    name: str = "clip"
    problem: str | None = None
    annotated: tuple[int, ...] = tuple(range(FRAMES))
    objects: int = 1
    occluded: NDArray[np.bool_] | None = None

    @property
    def frames(self) -> tuple[Path, ...]:
        return tuple(Path(f"{t:05d}.jpg") for t in range(FRAMES))

    def __len__(self) -> int:
        return FRAMES

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        return np.full((H * CELL, W * CELL, 3), index, dtype=np.uint8)

    def read_masks(self) -> NDArray[np.uint8]:
        masks = np.zeros((FRAMES, H * CELL, W * CELL), dtype=np.uint8)
        for t in range(FRAMES):
            for index in range(self.objects):
                top, left = (1 + 4 * index) * CELL, (1 + t) * CELL
                masks[t, top : top + 2 * CELL, left : left + 3 * CELL] = index + 1
        return masks[list(self.annotated)]

    def read_joints(self) -> Joints:
        first = np.array([[2.5, 1.5], [3.5, 4.5], [1.5, 6.5]]) * CELL
        xy = np.stack([first + np.array([t * CELL, 0]) for t in self.annotated])
        return Joints(xy, np.ones(xy.shape[:2], dtype=bool))

    def read_areas(self) -> NDArray[np.float64]:
        return np.full(len(self.annotated), 6.0 * CELL**2)

    def read_tracks(self, size: tuple[int, int] = (256, 256)) -> NDArray[np.float64]:
        joints = self.read_joints().xy.transpose(1, 0, 2)
        return joints / [W * CELL, H * CELL] * [size[1], size[0]]


TAPVID = Clip(occluded=np.zeros((3, FRAMES), dtype=bool))
CASES: dict[str, tuple[Task[Any], Clip]] = {
    "davis": (Davis(Path(), topk=1, context=2, radius=4), Clip(objects=2)),
    "folder": (Folder(Path(), topk=1, context=2, radius=4), Clip(annotated=(0, 2, 3))),
    "vip": (Vip(Path(), topk=1, context=2, radius=4), Clip(objects=2)),
    "jhmdb": (Jhmdb(Path(), topk=1, context=2, radius=4), Clip()),
    "badja": (Badja(Path()), Clip(annotated=(0, 2, 4))),
    "tapvid": (TapVid(Path()), TAPVID),
    "tapvid strided": (TapVid(Path(), mode="strided"), TAPVID),
}


@pytest.mark.parametrize("name", CASES)
def test_features_that_know_the_answer_score_high_and_others_low(name: str) -> None:
    task, clip = CASES[name]
    high = task.total([task.score(clip, KNOWS, GEOMETRY)])
    low = task.total([task.score(clip, KNOWS_NOTHING, GEOMETRY)])
    assert list(high) == list(task.measures)
    first = task.measures[0]
    assert high[first] > 0.9, high
    assert low[first] < high[first] - 0.2, low
    assert all(0 <= value <= 1 for key, value in high.items() if "decay" not in key)


@pytest.mark.parametrize("name", CASES)
def test_settings_and_sizes_are_plain(name: str) -> None:
    task, clip = CASES[name]
    assert all(isinstance(key, str) for key in task.settings())
    height, width = task.size(clip)
    assert isinstance(height, int)
    assert isinstance(width, int)


def test_sizes_follow_the_protocols() -> None:
    @dataclasses.dataclass(frozen=True)
    class Shaped(Clip):
        shape: tuple[int, int] = (720, 1280)

        def read_frame(self, index: int) -> NDArray[np.uint8]:
            return np.zeros((*self.shape, 3), dtype=np.uint8)

    assert CASES["davis"][0].size(Shaped()) == (480, 880)
    assert CASES["jhmdb"][0].size(Shaped()) == (320, 320)
    dino = Davis(Path(), protocol="dino")
    assert dino.size(Shaped(shape=(480, 854))) == (480, 832)
    assert dino.size(Shaped(shape=(854, 480))) == (832, 480)
    vip, tapvid = CASES["vip"][0], CASES["tapvid"][0]
    assert vip.size(Shaped()) == (448, 880), "495 floored to a multiple of 64"
    assert vip.size(Shaped(shape=(1280, 720))) == (880, 448)
    assert tapvid.size(Shaped()) == (480, 853)
    assert Vip(Path()).settings()["topk"] == 10


def test_davis_counts_every_object_once() -> None:
    task, _ = CASES["davis"]
    one = task.score(Clip(objects=1), KNOWS, GEOMETRY)
    two = task.score(Clip(objects=2), KNOWS_NOTHING, GEOMETRY)
    total = task.total([one, two])
    objects = [*one.counts["objects"], *two.counts["objects"]]
    assert len(objects) == 3
    assert total["J mean"] == pytest.approx(np.mean([each["J mean"] for each in objects]))
    assert total["J&F"] == pytest.approx((total["J mean"] + total["F mean"]) / 2)


def test_vip_sums_one_matrix() -> None:
    task, clip = CASES["vip"]
    high, low = task.score(clip, KNOWS, GEOMETRY), task.score(clip, KNOWS_NOTHING, GEOMETRY)
    matrix = np.array(high.counts["matrix"]) + np.array(low.counts["matrix"])
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    expected = (np.diag(matrix) / np.where(union, union, 1))[union > 0].mean()
    assert task.total([high, low])["mIoU"] == pytest.approx(expected)


def test_frames_nobody_drew_are_propagated_through_and_not_scored() -> None:
    task, _ = CASES["folder"]
    some = task.score(Clip(annotated=(0, 2, 3)), KNOWS, GEOMETRY)
    all_of_them = task.score(Clip(), KNOWS, GEOMETRY)
    assert some.values["J mean"] > 0.9
    assert some.values != all_of_them.values


def test_a_clip_without_a_first_mask_cannot_be_scored() -> None:
    for name in ("folder", "vip"):
        with pytest.raises(FrameError):
            CASES[name][0].score(Clip(annotated=(1, 2)), KNOWS, GEOMETRY)


@pytest.mark.parametrize("name", ["davis", "vip"])
def test_predicted_masks_are_palette_pngs_of_the_frames_size(name: str, tmp_path: Path) -> None:
    task, clip = CASES[name]
    task.score(clip, KNOWS, GEOMETRY, predictions=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{t:05d}.png" for t in range(FRAMES)]
    with Image.open(tmp_path / "00000.png") as picture:
        assert picture.mode == "P"
        first = np.asarray(picture)
    assert first.shape == (H * CELL, W * CELL)
    assert set(np.unique(first)) == {0, 1, 2}


@pytest.mark.parametrize("name", ["jhmdb", "badja", "tapvid"])
def test_predicted_positions_are_kept(name: str, tmp_path: Path) -> None:
    task, clip = CASES[name]
    task.score(clip, KNOWS, GEOMETRY, predictions=tmp_path)
    assert '"xy"' in (tmp_path / "positions.json").read_text()


def test_a_hidden_point_is_called_hidden_where_nothing_comes_home() -> None:
    """Half of the frames show another scene: its points do not come back to themselves."""
    features = torch.cat([KNOWS[:2], KNOWS_NOTHING[2:]])
    hidden = np.zeros((3, FRAMES), dtype=bool)
    hidden[:, 2:] = True
    clip = Clip(occluded=hidden)
    task = CASES["tapvid"][0]
    told = task.score(clip, features, GEOMETRY).values["OA"]
    assert told > task.score(clip, KNOWS, GEOMETRY).values["OA"]


def constant(features: Tensor) -> Tensor:
    return torch.ones_like(features)


@pytest.mark.parametrize("name", CASES)
def test_features_that_are_all_equal_still_give_numbers(name: str) -> None:
    task, clip = CASES[name]
    total = task.total([task.score(clip, constant(KNOWS), GEOMETRY)])
    lost = name == "jhmdb"  # all joints may be lost, and lost ones do not count
    assert lost or all(np.isfinite(list(total.values())))
