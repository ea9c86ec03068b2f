from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation import boundary_f, region_similarity, summarise

Mask = NDArray[np.bool_]


def definition_of_boundary(mask: Mask) -> Mask:
    """The official seg2bmap, pixel by pixel."""
    h, w = mask.shape
    edge = np.zeros_like(mask)
    for y in range(h):
        for x in range(w):
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
    if guess.any() != truth.any():
        return 0.0
    if not guess.any():
        return 1.0
    precision = (guess & near_truth).sum() / guess.sum()
    recall = (truth & near_guess).sum() / truth.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def adversarial_masks() -> list[Mask]:
    """Noise, blobs, empty and full frames, single pixels, stripes, corners; odd shapes too."""
    rng = np.random.default_rng(0)
    masks = []
    for h, w in [(23, 37), (30, 17), (1, 9), (8, 1), (1, 1), (40, 40)]:
        blob = ndimage.gaussian_filter(rng.standard_normal((h, w)), 3) > 0
        y, x = np.indices((h, w))
        pixel, full = (y == h // 2) & (x == w // 3), np.ones((h, w), dtype=bool)
        masks += [blob, ndimage.shift(blob.astype(float), (2, -1)) > 0.5, full, ~full]
        masks += [rng.random((h, w)) > share for share in (0.5, 0.97)]
        masks += [pixel, ~pixel, (y == h - 1) & (x == w - 1), (y == 0) & (x == 0)]
        masks += [(y + x) % 2 == 0, x > w // 2]
    return masks


MASKS = adversarial_masks()


def definition_of_j(gt: Mask, pred: Mask, void: Mask) -> float:
    """The official db_eval_iou, which counts pixel by pixel."""
    inter = union = 0
    for y, x in np.ndindex(gt.shape):
        if not void[y, x]:
            inter += gt[y, x] and pred[y, x]
            union += gt[y, x] or pred[y, x]
    return inter / union if union else 1.0


@pytest.mark.parametrize("tolerance", [0.0, 0.008, 0.03, 0.2, 1, 3, 2.5])
def test_measures_are_the_official_definitions(tolerance: float) -> None:
    rng = np.random.default_rng(7)
    pairs = [(gt, pred) for gt in MASKS for pred in MASKS if gt.shape == pred.shape]
    assert len(pairs) > 800
    for gt, pred in pairs:
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
    return (
        float(np.nanmean(values)),
        float(np.nanmean(values > 0.5)),
        float(np.nanmean(bins[0]) - np.nanmean(bins[3])),
    )


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 20, 78, 255])
def test_summary_is_the_official_statistics(frames: int) -> None:
    values = np.random.default_rng(frames).random(frames)
    assert summarise(values) == pytest.approx(official_statistics(values), abs=1e-12)


def test_summary_of_gaps_and_of_long_clips() -> None:
    values = np.array([0.9, np.nan, 0.7, 0.2, 0.1, 0.3, 0.6])
    assert summarise(values) == pytest.approx(official_statistics(values), abs=1e-12)
    assert math.isnan(summarise([math.nan]).mean)
    assert summarise(np.linspace(1, 0, 1000)).decay == pytest.approx(0.75, abs=1e-2)
    for wrong in (np.zeros(0), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"got values of shape .*, expected \(T,\)"):
            summarise(wrong)
