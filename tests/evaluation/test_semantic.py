from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.semantic import ConfusionMatrix

Labels = NDArray[np.uint8]


def definition(frames: list[tuple[Labels, Labels]], classes: int) -> tuple[float, list[float]]:
    """Intersection over union of every class over all frames together, then the mean."""
    iou = []
    for label in range(classes):
        inter = union = 0
        for gt, pred in frames:
            for truth, guess in zip(gt.flat, pred.flat, strict=True):
                if truth != 255:
                    inter += truth == label and guess == label
                    union += truth == label or guess == label
        iou.append(inter / union if union else math.nan)
    known = [value for value in iou if not math.isnan(value)]
    return (sum(known) / len(known) if known else math.nan), iou


def adversarial_frames(rng: np.random.Generator, classes: int) -> list[tuple[Labels, Labels]]:
    frames = []
    for _ in range(rng.integers(1, 4)):
        shape = tuple(rng.integers(1, 7, 2))
        kinds = [
            np.zeros(shape, dtype=np.uint8),
            np.full(shape, classes - 1, dtype=np.uint8),
            rng.integers(0, classes, shape).astype(np.uint8),
        ]
        gt = kinds[rng.integers(3)].copy()
        gt[rng.random(shape) < rng.choice([0.0, 0.3, 1.0])] = 255
        frames.append((gt, kinds[rng.integers(3)]))
    return frames


def test_equals_the_definition_on_200_clips() -> None:
    rng = np.random.default_rng(0)
    for index in range(200):
        classes = (1, 2, 5, 20)[index % 4]
        frames = adversarial_frames(rng, classes)
        matrix = ConfusionMatrix(classes)
        for gt, pred in frames:
            matrix.add(gt, pred)
        mean, iou = definition(frames, classes)
        np.testing.assert_allclose(matrix.per_class_iou(), iou, atol=1e-9)
        assert matrix.mean_iou() == pytest.approx(mean, abs=1e-9, nan_ok=True)


def test_one_matrix_is_not_the_mean_of_frames() -> None:
    matrix = ConfusionMatrix(2)
    matrix.add(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]]))
    matrix.add(np.array([[1, 0, 0, 0]]), np.array([[0, 0, 0, 0]]))
    assert matrix.per_class_iou() == pytest.approx([3 / 4, 4 / 5])


def test_which_classes_count() -> None:
    matrix = ConfusionMatrix(20)
    matrix.add(np.array([[0, 0, 3, 3]]), np.array([[0, 7, 3, 3]]))
    assert matrix.counts[0, 7] == 1, "rows are annotated, columns predicted"
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 1 + 0) / 3)
    nothing = ConfusionMatrix(3)
    nothing.add(np.full((2, 2), 255), np.zeros((2, 2), dtype=int))
    assert math.isnan(nothing.mean_iou())


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_perfect_is_one_and_frames_may_come_at_once(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    gt, pred = rng.integers(0, classes, (2, 3, 4, 5))
    one_by_one, at_once, perfect = (ConfusionMatrix(classes) for _ in range(3))
    for t in range(3):
        one_by_one.add(gt[t], pred[t])
    at_once.add(gt, pred)
    perfect.add(gt, gt, ignore=None)
    np.testing.assert_array_equal(one_by_one.counts, at_once.counts)
    assert perfect.mean_iou() == 1
    assert 0 <= at_once.mean_iou() <= 1


def test_wrong_labels_say_what_was_expected_and_leave_the_matrix() -> None:
    matrix = ConfusionMatrix(3)
    gt = np.array([[0, 1], [2, 255]])
    for truth, guess, ignore, message in [
        (gt, np.zeros((2, 3), dtype=int), 255, r"pred of shape \(2, 3\), expected \(2, 2\)"),
        (gt, np.zeros((2, 2)), 255, "pred of dtype float64, expected whole numbers"),
        (gt, np.full((2, 2), 3), 255, "pred has class 3, expected 0 to 2; make .* more classes$"),
        (gt, gt * 0, None, "gt has class 255, expected 0 to 2; .* pass that value as ignore"),
        (gt - 1, gt * 0, 255, "gt has class -1"),
    ]:
        with pytest.raises(FrameError, match=message):
            matrix.add(truth, guess, ignore=ignore)
    assert matrix.counts.sum() == 0
    with pytest.raises(ValueError, match="got 0 classes"):
        ConfusionMatrix(0)
