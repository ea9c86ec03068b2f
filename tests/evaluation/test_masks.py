from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from drawn import CELL, moving_squares
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import jaccard_score

from cosettle_adapter import evaluation
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation import (
    SequenceScores,
    boundary_f,
    evaluate_sequence,
    region_similarity,
    summarise,
)
from cosettle_adapter.evaluation.masks import ConfusionMatrix

Mask = NDArray[np.bool_]


def definition_of_boundary(mask: Mask) -> Mask:
    """The official seg2bmap, pixel by pixel."""
    h, w = mask.shape
    edge = np.zeros_like(mask)
    for y, x in np.ndindex(h, w):
        below, right = min(y + 1, h - 1), min(x + 1, w - 1)
        edge[y, x] = len({mask[y, x], mask[below, x], mask[y, right], mask[below, right]}) > 1
    return edge


def definition_of_f(truth: Mask, guess: Mask, tolerance: float) -> float:
    """Dilate both boundaries by a disk and look up, as the official code does."""
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * np.linalg.norm(truth.shape))
    side = np.arange(-math.floor(radius), math.floor(radius) + 1)
    disk = side[:, None] ** 2 + side[None] ** 2 <= radius**2
    near_guess = ndimage.binary_dilation(guess, disk)
    near_truth = ndimage.binary_dilation(truth, disk)
    if guess.any() != truth.any() or not guess.any():
        return float(guess.any() == truth.any())
    precision = (guess & near_truth).sum() / guess.sum()
    recall = (truth & near_guess).sum() / truth.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def definition_of_j(gt: Mask, pred: Mask, void: Mask) -> float:
    """The official db_eval_iou, which counts pixel by pixel."""
    inter = union = 0
    for y, x in np.ndindex(gt.shape):
        if not void[y, x]:
            inter += gt[y, x] and pred[y, x]
            union += gt[y, x] or pred[y, x]
    return inter / union if union else 1.0


def adversarial_masks() -> list[Mask]:
    """Noise, blobs, empty and full frames, single pixels, stripes, corners; odd shapes too."""
    rng = np.random.default_rng(0)
    masks = []
    for h, w in [(15, 22), (18, 9), (1, 9), (8, 1), (1, 1)]:
        blob = ndimage.gaussian_filter(rng.standard_normal((h, w)), 2) > 0
        y, x = np.indices((h, w))
        pixel, full = (y == h // 2) & (x == w // 3), np.ones((h, w), dtype=bool)
        masks += [blob, ndimage.shift(blob.astype(float), (2, -1)) > 0.5, full, ~full]
        masks += [rng.random((h, w)) > share for share in (0.5, 0.97)]
        masks += [pixel, ~pixel, (y == h - 1) & (x == w - 1), (y == 0) & (x == 0)]
        masks += [(y + x) % 2 == 0, x > w // 2]
    return masks


MASKS = adversarial_masks()
PAIRS = [(gt, pred) for gt in MASKS for pred in MASKS if gt.shape == pred.shape]


@pytest.mark.parametrize("tolerance", [0.0, 0.008, 0.2, 1, 2.5])
def test_measures_are_the_official_definitions(tolerance: float) -> None:
    rng = np.random.default_rng(7)
    for gt, pred in PAIRS:
        void = rng.random(gt.shape) < rng.choice([0, 0.1, 1], p=[0.5, 0.4, 0.1])
        truth, guess = definition_of_boundary(gt & ~void), definition_of_boundary(pred & ~void)
        expected = definition_of_f(truth, guess, tolerance)
        assert boundary_f(gt, pred, tolerance, void=void) == pytest.approx(expected, abs=1e-9)
        if tolerance == 1:
            expected = definition_of_j(gt, pred, void)
            assert region_similarity(gt, pred, void=void) == pytest.approx(expected, abs=1e-9)


def test_wrong_masks_say_what_was_expected() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    for gt, pred, void, message in [
        (mask, mask.T, mask, r"pred \(5, 4\) .* expected \(H, W\)"),
        (mask[None], mask[None], mask[None], r"gt \(1, 4, 5\)"),
        (mask.astype(np.uint8), mask, mask, "use labels == id"),
        (mask, mask, mask[:2], r"void \(2, 5\)"),
    ]:
        with pytest.raises(FrameError, match=message):
            region_similarity(gt, pred, void=void)
    with pytest.raises(ValueError, match="tolerance must be 0 or more, got -1"):
        boundary_f(mask, mask, tolerance=-1)


def official_statistics(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The official db_statistics, whose uint8 indices need clips of at most 255 frames."""
    ids = np.round(np.linspace(1, len(values), 5) + 1e-10) - 1
    ids = ids.astype(np.uint8)
    bins = [values[ids[i] : ids[i + 1] + 1] for i in range(4)]
    decay = np.nanmean(bins[0]) - np.nanmean(bins[3])
    return float(np.nanmean(values)), float(np.nanmean(values > 0.5)), float(decay)


def test_summary_is_the_official_statistics() -> None:
    gaps = np.array([0.9, np.nan, 0.7, 0.2, 0.1, 0.3, 0.6])
    random = [np.random.default_rng(length).random(length) for length in (1, 2, 3, 4, 5, 78, 255)]
    for values in (gaps, *random):
        assert summarise(values) == pytest.approx(official_statistics(values), abs=1e-12)
    assert math.isnan(summarise([math.nan]).mean)
    assert summarise(np.linspace(1, 0, 1000)).decay == pytest.approx(0.75, abs=1e-2)
    for wrong in (np.zeros(0), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"got values of shape .*, expected \(T,\)"):
            summarise(wrong)


FEATURES, SQUARES = moving_squares()


def test_the_first_and_last_frame_do_not_count_and_maps_may_stream() -> None:
    expected = evaluate_sequence(FEATURES, SQUARES)
    masks = SQUARES.copy()
    masks[-1] = 0
    assert evaluate_sequence((frame[None] for frame in FEATURES), masks) == expected


def relabelled(labels: Sequence[int], **pixels: int) -> NDArray[np.uint8]:
    """The two objects with other ids, and a stripe that no prediction has, in the third frame."""
    masks = np.asarray(labels, dtype=np.uint8)[SQUARES]
    for where, label in pixels.items():
        masks[0 if where == "first" else 2, 3 * CELL : 4 * CELL] = label
    return masks


@pytest.mark.parametrize(
    "masks",
    [
        SQUARES,
        relabelled((0, 2, 9)),  # ids with gaps
        relabelled((0, 9, 2), stripe=5),  # an id in a gap that comes late
        relabelled((0, 2, 4), stripe=7),  # an id above the highest
        relabelled((0, 1, 2), stripe=255, first=255),
    ],
)
def test_objects_and_void_are_those_of_the_official_evaluation(masks: NDArray[np.uint8]) -> None:
    """The ids are 1 to the highest of the first mask; void is background, where objects count."""
    predicted: dict[int, NDArray[np.uint8]] = {}
    scores = evaluate_sequence(FEATURES, masks, on_mask=predicted.__setitem__)
    truth = np.where(masks == 255, 0, masks)
    none = np.zeros(truth.shape[1:], dtype=bool)
    expected = []
    for label in range(1, truth[0].max() + 1):
        for t in range(1, len(truth) - 1):
            gt, pred = truth[t] == label, predicted[t] == label
            reach = definition_of_f(*map(definition_of_boundary, (gt, pred)), 0.008)
            expected.append((label, definition_of_j(gt, pred, none), reach))
    got = [
        (label, j, f)
        for label, js, fs in zip(scores.objects, scores.j, scores.f, strict=True)
        for j, f in zip(js, fs, strict=True)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_the_mean_is_over_objects_not_over_clips() -> None:
    one = SequenceScores((1,), j=((1.0,),), f=((1.0,),))
    three = SequenceScores((1, 2, 5), j=((0.0,), (0.0,), (0.4,)), f=((0.0,), (0.0,), (0.0,)))
    assert three.per_object == pytest.approx([0.0, 0.0, 0.2])
    assert evaluation.mean_over_objects([one, three]) == pytest.approx(0.3)


def test_masks_that_cannot_be_scored() -> None:
    for features, masks, annotated, message in (
        (FEATURES[:4], SQUARES, None, "masks up to frame 4, but 4 feature maps"),
        (FEATURES, SQUARES[:4], None, "masks up to frame 3, but 5 feature maps"),
        (FEATURES[:4], SQUARES[[0, 2, 4]], [0, 2, 4], "masks up to frame 4, but 4 feature maps"),
        (FEATURES[:2], SQUARES[:2], None, "first and the last of the clip's 2 frames do not"),
        (FEATURES, SQUARES[[1, 3]], [1, 3], r"48, 80\) for the frames \[1, 3\].* of frame 0"),
        (FEATURES, SQUARES[[0, 3]], [0], r"48, 80\) for the frames \[0\], .* one mask"),
        (FEATURES, SQUARES[0], None, r"uint8 masks of shape \(48, 80\).* expected uint8 \(T, H, W"),
        (FEATURES, SQUARES.astype(int), None, "int64 masks"),
        (FEATURES, SQUARES * 0, None, "first mask has no object"),
        ([torch.rand(2, 3, 6, 10)] * 5, SQUARES, None, r"\(C, h, w\)"),
    ):
        with pytest.raises((FrameError, GeometryError), match=message):
            evaluate_sequence(features, masks, annotated=annotated)


@pytest.mark.parametrize("classes", [1, 2, 5, 20])
def test_mean_iou_equals_scikit_learn_over_all_frames_together(classes: int) -> None:
    rng = np.random.default_rng(classes)
    matrix, (truth, guess) = ConfusionMatrix(classes), rng.integers(0, classes, (2, 3, 5, 6))
    truth[rng.random(truth.shape) < 0.3] = 255
    assert math.isnan(matrix.mean_iou())
    for frame in zip(truth, guess, strict=True):
        matrix.add(*frame)
    truth, guess = truth[truth != 255], guess[truth != 255]
    expected = jaccard_score(truth, guess, labels=np.union1d(truth, guess), average="macro")
    assert matrix.mean_iou() == pytest.approx(expected)


def test_wrong_labels_say_what_was_expected_and_leave_the_matrix() -> None:
    matrix = ConfusionMatrix(3)
    gt = np.array([[0, 1], [2, 255]])
    for truth, guess, ignore, message in [
        (gt, np.zeros((2, 3), dtype=int), 255, r"pred of shape \(2, 3\), expected \(2, 2\)"),
        (gt, np.full((2, 2), 3), 255, "pred has class 3, expected 0 to 2; create .* more classes"),
        (gt, gt * 0, None, "gt has class 255, expected 0 to 2; .* value as ignore"),
        (gt - 1, gt * 0, 255, "gt has class -1"),
    ]:
        with pytest.raises(FrameError, match=message):
            matrix.add(truth, guess, ignore=ignore)
    assert matrix.counts.sum() == 0
    matrix.add([[1, 0]], [[1, 2]])
    assert matrix.counts[0, 2] == 1, "rows are annotated, columns predicted"
