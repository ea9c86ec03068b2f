from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import (
    queries_first,
    queries_strided,
    tapvid_metrics,
)
from cosettle_adapter.evaluation.points import QueryMode

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Video = tuple[Floats, Flags, Floats, Flags, Floats]

MODES: tuple[QueryMode, ...] = ("first", "strided")


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
    """Points a few pixels off, with any share of occlusion, none and all among them."""
    q, t = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    gt = rng.uniform(0, 256, (q, t, 2))
    pred = gt + rng.normal(0, 1, gt.shape) * rng.choice([0.5, 4, 20], (q, t, 1))
    gt_occluded, occluded = (rng.random((q, t)) < rng.choice([0, 0.4, 1]) for _ in range(2))
    query = np.column_stack([rng.integers(0, t, q), gt[:, 0, 1], gt[:, 0, 0]])
    return query, gt_occluded, gt, occluded, pred


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_definition_on_200_videos(mode: QueryMode) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        video = random_video(rng)
        assert tapvid_metrics(*video, mode)[:3] == pytest.approx(
            definition(video, mode), abs=1e-9, nan_ok=True
        )


def test_a_known_video() -> None:
    gt = np.zeros((1, 5, 2))
    pred = gt.copy()
    pred[0, :, 0] = [99, 0, 1, 3, 99]  # the query's own frame never counts
    gt_occluded = np.array([[False, False, False, False, True]])
    metrics = tapvid_metrics(np.zeros((1, 3)), gt_occluded, gt, gt_occluded & False, pred)
    assert metrics.occlusion_accuracy == 3 / 4
    # a distance equal to the threshold is not within it
    assert metrics.pts_within == pytest.approx({1: 1 / 3, 2: 2 / 3, 4: 1, 8: 1, 16: 1})
    # three visible, and the claim in frame 4 is false in any case
    assert metrics.jaccard == pytest.approx({1: 1 / 6, 2: 2 / 5, 4: 3 / 4, 8: 3 / 4, 16: 3 / 4})
    assert metrics.delta_avg == pytest.approx(0.8)


OCCLUDED = np.array(
    [
        [True, True, False, False, True, False],
        [True, True, True, True, True, True],
        [False, False, False, False, False, True],
    ]
)
TRACKS = np.arange(36.0).reshape(3, 6, 2)


def test_queries_where_a_track_is_first_visible() -> None:
    queries = queries_first(OCCLUDED, TRACKS)
    np.testing.assert_array_equal(queries.track, [0, 2])
    np.testing.assert_array_equal(queries.points, [[2, 5, 4], [0, 25, 24]])  # (t, y, x)
    np.testing.assert_array_equal(queries.tracks, TRACKS[[0, 2]])
    np.testing.assert_array_equal(queries.occluded, OCCLUDED[[0, 2]])


def test_queries_at_every_stride() -> None:
    queries = queries_strided(OCCLUDED, TRACKS)
    np.testing.assert_array_equal(queries.track, [2, 0])
    np.testing.assert_array_equal(queries.points, [[0, 25, 24], [5, 11, 10]])
    queries = queries_strided(OCCLUDED, TRACKS, stride=2)
    np.testing.assert_array_equal(queries.track, [2, 0, 2, 2])
    np.testing.assert_array_equal(queries.points[:, 0], [0, 2, 2, 4])
    with pytest.raises(ValueError, match="stride must be at least 1"):
        queries_strided(OCCLUDED, TRACKS, stride=0)


@given(st.integers(0, 10_000), st.sampled_from(MODES))
def test_queries_can_be_scored(seed: int, mode: QueryMode) -> None:
    _, occluded, gt, _, _ = random_video(np.random.default_rng(seed))
    queries = queries_first(occluded, gt) if mode == "first" else queries_strided(occluded, gt, 2)
    frames = queries.points[:, 0].astype(int)
    assert not occluded[queries.track, frames].any()
    np.testing.assert_array_equal(queries.points[:, :0:-1], gt[queries.track, frames])
    metrics = tapvid_metrics(
        queries.points, queries.occluded, queries.tracks, queries.occluded, queries.tracks, mode
    )
    assert metrics.occlusion_accuracy == 1 or math.isnan(metrics.occlusion_accuracy)


def test_wrong_points_say_what_was_expected() -> None:
    query, occluded, gt = np.zeros((2, 3)), np.zeros((2, 4), dtype=bool), np.zeros((2, 4, 2))
    late, unknown = np.full((2, 3), 4.0), gt.copy()
    unknown[1, 2] = np.nan
    for arguments, message in [
        (
            (query, occluded, gt, occluded, gt[:, :3]),
            r"pred occlusion of .* \(2, 4\), expected bool",
        ),
        ((query, occluded, gt, occluded[:, :3], gt[:, :3]), r"pred_tracks of shape \(2, 3, 2\)"),
        ((query, occluded * 1, gt, occluded, gt), "gt occlusion of dtype int64"),
        (
            (query, occluded, gt[..., 0], occluded, gt),
            r"gt tracks of shape \(2, 4\), expected \(Q, T",
        ),
        (
            (query[:, :2], occluded, gt, occluded, gt),
            r"query_points of shape \(2, 2\), .* \(t, y, x\)",
        ),
        (
            (late, occluded, gt, occluded, gt),
            r"a query in frame 4.0, expected 0 to 3; .* frame first",
        ),
        ((query, occluded, gt, occluded, unknown), "pred_tracks has a position that is not finite"),
    ]:
        with pytest.raises(FrameError, match=message):
            tapvid_metrics(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode='last', expected 'first' or 'strided'"):
        tapvid_metrics(query, occluded, gt, occluded, gt, "last")  # type: ignore[arg-type]
