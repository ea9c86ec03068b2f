from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.masks import ConfusionMatrix


@given(seed=st.integers(0, 10_000), classes=st.sampled_from([1, 2, 5, 20]))
def test_equals_scikit_learn_over_all_frames_together(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, frames = ConfusionMatrix(classes), []
    for _ in range(rng.integers(1, 4)):
        gt, pred = rng.integers(0, rng.integers(1, classes + 1), (2, *rng.integers(1, 7, 2)))
        gt[rng.random(gt.shape) < 0.3] = 255
        matrix.add(gt, pred)
        frames.append((gt[gt != 255], pred[gt != 255]))
    truth, guess = (np.concatenate(each) for each in zip(*frames, strict=True))
    known = np.union1d(truth, guess)
    expected = (
        jaccard_score(truth, guess, labels=known, average="macro") if len(known) else math.nan
    )
    assert matrix.mean_iou() == pytest.approx(expected, nan_ok=True)


def test_one_matrix_is_not_the_mean_of_frames_and_predicted_classes_count() -> None:
    matrix = ConfusionMatrix(20)
    matrix.add([[1, 1, 1, 1]], [[1, 1, 1, 1]])
    matrix.add([[1, 0, 0, 0]], [[0, 0, 0, 7]])
    assert matrix.counts[0, 7] == 1, "rows are annotated, columns predicted"
    assert matrix.mean_iou() == pytest.approx((2 / 4 + 4 / 5 + 0) / 3)


def test_wrong_labels_say_what_was_expected_and_leave_the_matrix() -> None:
    matrix = ConfusionMatrix(3)
    gt = np.array([[0, 1], [2, 255]])
    for truth, guess, ignore, message in [
        (gt, np.zeros((2, 3), dtype=int), 255, r"pred of shape \(2, 3\), expected \(2, 2\)"),
        (gt, np.zeros((2, 2)), 255, "pred of dtype float64, expected whole numbers"),
        (gt, np.full((2, 2), 3), 255, "pred has class 3, expected 0 to 2; make .* more classes"),
        (gt, gt * 0, None, "gt has class 255, expected 0 to 2; .* value as ignore"),
        (gt - 1, gt * 0, 255, "gt has class -1"),
    ]:
        with pytest.raises(FrameError, match=message):
            matrix.add(truth, guess, ignore=ignore)
    assert matrix.counts.sum() == 0
