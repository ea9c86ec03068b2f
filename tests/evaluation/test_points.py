from __future__ import annotations

import functools
import math
import operator

import numpy as np
import pytest
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import (
    badja_accuracy,
    pck,
    queries_first,
    queries_strided,
    tapvid_metrics,
)
from cosettle_adapter.evaluation.points import QueryMode

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Joints = tuple[Floats, Floats, Flags]
Video = tuple[Floats, Flags, Floats, Flags, Floats]

MODES: tuple[QueryMode, ...] = ("first", "strided")


def random_joints(rng: np.random.Generator, joints: int = 6) -> Joints:
    """Annotation, prediction a few pixels off, and which joints count, sometimes none of them.

    In whole pixels, so that some distances are equal to thresholds.
    """
    frames = int(rng.integers(2, 7))
    gt = rng.integers(-2, 32, (frames, joints, 2)) * 5.0
    pred = gt + rng.normal(0, rng.choice([1, 3, 30]), gt.shape).round()
    visible = rng.random((frames, joints)) < rng.choice([0.2, 0.9, 1.0])
    return gt, pred, visible


def definition_of_pck(clips: list[Joints], threshold: float) -> float:
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


def test_pck_is_the_published_definition_on_50_data_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        clips = [random_joints(rng) for _ in range(rng.integers(1, 4))]
        counts = [pck(gt, pred, visible=visible) for gt, pred, visible in clips]
        pooled = functools.reduce(operator.add, counts)
        for threshold in (0.1, 0.2):
            expected = definition_of_pck(clips, threshold)
            assert pooled.mean[threshold] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_pck_counts_what_is_just_at_the_threshold_and_never_what_is_hidden() -> None:
    gt = np.zeros((3, 3, 2))
    gt[:, 1], gt[:, 2] = [30, 40], [np.nan, 1e9]  # a diagonal of 50, a scale of 30
    pred = gt.copy()
    pred[1, 0] += [3, 0]
    pred[2, 0] += [0, 4]
    visible = np.array([[True, True, False]] * 3)
    result = pck(gt, pred, visible=visible)
    np.testing.assert_array_equal(result.total, [2, 2, 0])
    np.testing.assert_array_equal(result.correct, [[1, 2], [2, 2], [0, 0]])
    assert pck(gt[:, :2], np.full((3, 2, 2), np.nan)).mean == {0.1: 0, 0.2: 0}
    with pytest.raises(ValueError, match="cannot pool counts"):
        result + pck(gt, gt, (0.5,), visible=visible)


def definition_of_badja(clip: Joints, areas: Floats) -> tuple[float, float]:
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


def test_badja_is_the_published_definition_on_50_clips() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        clip = random_joints(rng)
        areas = rng.choice([0, 400, 30_000], len(clip[0])).astype(float)
        result = badja_accuracy(*clip, areas)
        expected = definition_of_badja(clip, areas)
        assert result[:2] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert result.positions == clip[2][1:].sum()


def definition(video: Video, mode: str) -> tuple[float, float, float]:
    """delta_avg, OA and AJ as the TAP-Vid paper words them, position by position."""
    query, gt_occluded, gt, occluded, pred = video
    positions = [
        (q, t)
        for q in range(len(gt))
        for t in range(gt.shape[1])
        if (t > round(query[q, 0]) if mode == "first" else t != round(query[q, 0]))
    ]
    right = [gt_occluded[p] == occluded[p] for p in positions]
    within, jaccard = [], []
    for threshold in (1, 2, 4, 8, 16):
        near = {p: math.dist(gt[p], pred[p]) < threshold for p in positions}
        visible = [p for p in positions if not gt_occluded[p]]
        within.append(share(sum(near[p] for p in visible), len(visible)))
        hits = misses = false_alarms = 0
        for p in positions:
            truly, claimed = not gt_occluded[p], not occluded[p]
            hits += truly and claimed and near[p]
            # a visible point that was not found, whether claimed elsewhere or given up
            misses += truly and not (claimed and near[p])
            # a claim where there is nothing, or nothing near
            false_alarms += claimed and not (truly and near[p])
        jaccard.append(share(hits, hits + misses + false_alarms))
    return sum(within) / 5, share(sum(right), len(right)), sum(jaccard) / 5


def share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def random_video(rng: np.random.Generator) -> Video:
    """Points some whole pixels off, with any share of occlusion, none and all among them."""
    q, t = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    gt = rng.integers(0, 256, (q, t, 2)) * 1.0
    pred = gt + (rng.normal(0, 1, gt.shape) * rng.choice([1, 4, 20], (q, t, 1))).round()
    gt_occluded, occluded = (rng.random((q, t)) < rng.choice([0, 0.4, 1]) for _ in range(2))
    query = np.column_stack([rng.integers(0, t, q), gt[:, 0, 1], gt[:, 0, 0]])
    return query, gt_occluded, gt, occluded, pred


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_definition_on_50_videos(mode: QueryMode) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        video = random_video(rng)
        assert tapvid_metrics(*video, mode)[:3] == pytest.approx(
            definition(video, mode), abs=1e-9, nan_ok=True
        )


def test_queries_are_where_a_track_is_first_visible_or_at_every_stride() -> None:
    occluded = np.array([[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]) > 0
    tracks = np.arange(36.0).reshape(3, 6, 2)
    queries = queries_first(occluded, tracks)
    np.testing.assert_array_equal(queries.track, [0, 2])
    np.testing.assert_array_equal(queries.points, [[2, 5, 4], [0, 25, 24]])  # (t, y, x)
    np.testing.assert_array_equal(queries.tracks, tracks[[0, 2]])
    np.testing.assert_array_equal(queries.occluded, occluded[[0, 2]])
    queries = queries_strided(occluded, tracks)
    np.testing.assert_array_equal(queries.track, [2, 0])
    np.testing.assert_array_equal(queries.points, [[0, 25, 24], [5, 11, 10]])
    queries = queries_strided(occluded, tracks, stride=2)
    np.testing.assert_array_equal(queries.track, [2, 0, 2, 2])
    np.testing.assert_array_equal(queries.points[:, 0], [0, 2, 2, 4])


def test_wrong_arrays_say_what_was_expected() -> None:
    gt, seen = np.zeros((2, 4, 2)), np.ones((2, 4), dtype=bool)
    query, late = np.zeros((2, 3)), np.full((2, 3), 4.0)
    lost = np.where(np.arange(4)[:, None] == 3, np.nan, gt)
    for measure, arguments, message in (
        (pck, (gt, gt[:1]), r"pred of shape \(1, 4, 2\), expected \(T, J, 2\).* has \(2, 4, 2\)"),
        (badja_accuracy, (gt[..., 0], gt[..., 0], seen, [1, 1]), r"gt of shape \(2, 4\), expected"),
        (badja_accuracy, (gt, gt, seen * 1, [1, 1]), r"visible int64 \(2, 4\), expected bool"),
        (badja_accuracy, (gt, gt, seen, [1]), r"areas of shape \(1,\), expected \(T,\) = \(2,\)"),
        (pck, (lost, gt), "gt has a position that counts and is not finite; correct it, or"),
        (badja_accuracy, (lost, gt, seen, [1, 1]), "gt has a position that counts and is not"),
        (tapvid_metrics, (query, ~seen, lost, seen, gt), "gt_tracks has a position that counts"),
        (tapvid_metrics, (query[:1], seen, gt, seen, gt), r"query_points of .*, expected \(2, 3\)"),
        (queries_first, (seen[:, :3], gt), r"occluded bool \(2, 3\), expected bool \(2, 4\)"),
        (tapvid_metrics, (query, seen, gt, seen, gt[:, :3]), r"pred_tracks of .* \(Q, T, 2\)"),
        (tapvid_metrics, (late, seen, gt, seen, gt), "in frame 4.0, .* the frame first"),
    ):
        with pytest.raises(FrameError, match=message):
            measure(*arguments)  # type: ignore[operator]
    with pytest.raises(ValueError, match="mode='last', expected 'first' or 'strided'"):
        tapvid_metrics(query, seen, gt, seen, gt, "last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stride must be at least 1"):
        queries_strided(seen, gt, stride=0)
