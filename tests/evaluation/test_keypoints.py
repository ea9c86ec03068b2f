from __future__ import annotations

import functools
import math
import operator

import numpy as np
import pytest
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import Pck, badja_accuracy, joint_box_scale, pck

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Clip = tuple[Floats, Floats, Flags]


def random_clip(rng: np.random.Generator, joints: int = 15) -> Clip:
    """Annotation, prediction a few pixels off, and which joints count, sometimes none of them."""
    frames = int(rng.integers(2, 9))
    gt = rng.uniform(-20, 320, (frames, joints, 2))
    pred = gt + rng.normal(0, rng.choice([1, 30, 100]), gt.shape)
    visible = rng.random((frames, joints)) < rng.choice([0.2, 0.9, 1.0])
    return gt, pred, visible


def definition_of_pck(clips: list[Clip], threshold: float) -> float:
    """JHMDB's published evaluation, joint by joint."""
    distances: list[list[float]] = [[] for _ in range(clips[0][0].shape[1])]
    for gt, pred, visible in clips:
        for t in range(1, len(gt)):
            seen = [j for j in range(gt.shape[1]) if visible[t, j]]
            if not seen:
                continue
            xs, ys = gt[t, seen, 0], gt[t, seen, 1]
            box = 0.6 * math.hypot(max(xs) - min(xs), max(ys) - min(ys))
            for j in seen:
                d = math.dist(gt[t, j], pred[t, j])
                distances[j].append(d / box if box else math.inf)
    shares = [sum(d <= threshold for d in joint) / len(joint) for joint in distances if joint]
    return sum(shares) / len(shares) if shares else math.nan


def test_pck_is_the_published_definition_on_200_data_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        clips = [random_clip(rng) for _ in range(rng.integers(1, 4))]
        pooled = functools.reduce(
            operator.add, (pck(gt, pred, visible=visible) for gt, pred, visible in clips)
        )
        for threshold in (0.1, 0.2):
            expected = definition_of_pck(clips, threshold)
            assert pooled.mean[threshold] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_known_clip() -> None:
    gt = np.zeros((3, 2, 2))
    gt[:, 1] = [30, 40]  # a diagonal of 50, a scale of 30
    pred = gt.copy()
    pred[1, 0] += [3, 0]  # just at 0.1
    pred[2, 0] += [0, 4]
    pred[2, 1] += [100, 0]
    assert joint_box_scale(gt) == pytest.approx([30, 30, 30])
    result = pck(gt, pred)
    np.testing.assert_array_equal(result.total, [2, 2])
    np.testing.assert_array_equal(result.correct, [[1, 2], [1, 1]])
    assert result.mean == {0.1: 0.5, 0.2: 0.75}
    assert pck(gt, pred, first_frame=True).mean[0.1] == pytest.approx(2 / 3)
    assert pck(gt, pred, scale=1000.0).mean == {0.1: 1.0, 0.2: 1.0}
    assert pck(gt, pred, scale=[1, 1, 39.0], thresholds=[0.1]).mean == {0.1: 0.25}


def test_invisible_joints_make_neither_the_box_nor_the_score() -> None:
    gt = np.zeros((2, 3, 2))
    gt[:, 1], gt[:, 2] = [30, 40], [np.nan, 1e9]
    visible = np.array([[True, True, False]] * 2)
    result = pck(gt, gt, visible=visible)
    assert joint_box_scale(gt, visible) == pytest.approx([30, 30])
    assert result.mean == {0.1: 1, 0.2: 1}
    assert math.isnan(result.per_joint[2, 0])
    assert math.isnan(pck(gt, gt, visible=visible & False).mean[0.1])
    one_point = np.full((2, 2, 2), 7.0)
    assert pck(one_point, one_point).mean == {0.1: 0, 0.2: 0}, "a scale of 0 is a miss"
    assert pck(one_point, one_point, scale=1.0).mean == {0.1: 1, 0.2: 1}
    with pytest.raises(FrameError, match=r"got 1 frame.*pass first_frame=True"):
        pck(gt[:1], gt[:1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pred": np.zeros((3, 2, 3))}, FrameError, r"pred of shape \(3, 2, 3\), expected \(T, J"),
        ({"pred": np.zeros((3, 4, 2))}, FrameError, r"pred of shape \(3, 4, 2\), expected \(3, 2"),
        ({"visible": np.ones((3, 2))}, FrameError, r"visible of dtype float64 .* bool \(T, J\)"),
        ({"scale": np.ones(2)}, FrameError, r"scale of shape \(2,\), expected a number or \(T,\)"),
        ({"scale": -1.0}, ValueError, "scale must be 0 or more pixels, got -1"),
        ({"thresholds": (-0.1,)}, ValueError, "thresholds must be 0 or more"),
        (
            {"pred": np.full((3, 2, 2), np.nan)},
            FrameError,
            "pred of joint 0 in frame 0 is .* as invisible",
        ),
    ],
)
def test_wrong_joints_say_what_was_expected(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    gt = np.arange(12.0).reshape(3, 2, 2)
    with pytest.raises(error, match=message):
        pck(**{"gt": gt, "pred": gt, **arguments})  # type: ignore[arg-type]


def test_different_measures_do_not_pool() -> None:
    gt = np.arange(12.0).reshape(3, 2, 2)
    with pytest.raises(ValueError, match="cannot pool 2 joints at"):
        pck(gt, gt) + pck(gt, gt, thresholds=(0.5,))
    pooled = pck(gt, gt) + pck(gt, gt)
    assert isinstance(pooled, Pck)
    np.testing.assert_array_equal(pooled.total, [4, 4])


def definition_of_badja(clip: Clip, areas: Floats) -> tuple[float, float]:
    """The published evaluation: all visible positions but those of the first frame."""
    gt, pred, visible = clip
    seg, near = [], []
    for j in range(gt.shape[1]):
        for t in range(1, len(gt)):
            if visible[t, j]:
                distance = math.dist(gt[t, j], pred[t, j])
                seg.append(distance < 0.2 * math.sqrt(areas[t]))
                near.append(distance < 3.0)
    return (sum(seg) / len(seg), sum(near) / len(near)) if seg else (math.nan, math.nan)


def test_badja_is_the_published_definition_on_200_clips() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        clip = random_clip(rng, joints=20)
        areas = rng.choice([0, 400, 30_000], len(clip[0])).astype(float)
        result = badja_accuracy(*clip, areas)
        expected = definition_of_badja(clip, areas)
        assert result[:2] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert result.positions == clip[2][1:].sum()


def test_badja_distances_are_strictly_below_the_threshold() -> None:
    gt = np.zeros((2, 2, 2))
    pred = gt.copy()
    pred[1] = [[3, 0], [0, 2.999]]
    areas = [100, 225]  # a threshold of exactly 3 pixels
    result = badja_accuracy(gt, pred, np.ones((2, 2), dtype=bool), areas)
    assert result.delta_3px == 0.5
    assert result.delta_seg == 0.5


def test_badja_can_leave_out_what_was_given() -> None:
    gt = np.zeros((4, 2, 2))
    pred = gt + 100
    pred[2, 1] = 0  # the second joint's own query
    visible = np.array([[True, False], [True, False], [True, True], [True, True]])
    areas = np.full(4, 50.0)
    assert badja_accuracy(gt, pred, visible, areas).delta_3px == pytest.approx(1 / 5)
    later = badja_accuracy(gt, pred, visible, areas, query_frames=[0, 2])
    assert later == (0.0, 0.0, 4)


def test_areas_of_frames_without_joints_are_not_read() -> None:
    gt = np.zeros((3, 1, 2))
    visible = np.array([[True], [False], [True]])
    assert badja_accuracy(gt, gt, visible, [np.nan, np.nan, 9.0]).delta_seg == 1
    with pytest.raises(FrameError, match="areas of frames that count must be 0 or more"):
        badja_accuracy(gt, gt, visible, [9.0, 9.0, np.nan])


def test_wrong_animals_say_what_was_expected() -> None:
    gt, visible, areas = np.zeros((3, 2, 2)), np.ones((3, 2), dtype=bool), np.ones(3)
    with pytest.raises(FrameError, match=r"areas of shape \(2,\), expected \(T,\) = \(3,\)"):
        badja_accuracy(gt, gt, visible, areas[:2])
    with pytest.raises(FrameError, match=r"pred of shape \(2, 2, 2\), expected \(3, 2, 2\)"):
        badja_accuracy(gt, gt[:2], visible, areas)
    with pytest.raises(FrameError, match=r"query_frames of shape \(3,\), expected \(J,\) = \(2,\)"):
        badja_accuracy(gt, gt, visible, areas, query_frames=[0, 0, 0])
    with pytest.raises(FrameError, match="pred of joint 1 in frame 2"):
        badja_accuracy(gt, np.where(np.indices(gt.shape).sum(0) == 4, np.inf, gt), visible, areas)
