from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import CELL, moving_squares

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation import (
    SequenceScores,
    boundary_f,
    evaluate_sequence,
    mean_over_objects,
    region_similarity,
)

FEATURES, MASKS = moving_squares()


@pytest.mark.parametrize("protocol", ["crw", "dino"])
def test_features_that_know_the_motion_score_perfectly(protocol: str) -> None:
    scores = evaluate_sequence(FEATURES, MASKS, protocol=protocol, topk=1)
    assert scores.objects == (1, 2)
    assert [len(values) for values in scores.j] == [3, 3]
    assert scores.j_and_f > 0.8  # corners are rounded on the way through the grid


def test_still_features_score_what_the_first_mask_scores() -> None:
    still = torch.randn(1, 8, 6, 10).expand(5, -1, -1, -1)
    scores = evaluate_sequence(still, MASKS, topk=1)
    for found, measure in ((scores.j, region_similarity), (scores.f, boundary_f)):
        for values, label in zip(found, scores.objects, strict=True):
            expected = [measure(MASKS[t] == label, MASKS[0] == label) for t in (1, 2, 3)]
            assert values == pytest.approx(expected, abs=0.1)


def test_first_and_last_frame_do_not_count_and_maps_may_stream() -> None:
    expected = evaluate_sequence(FEATURES, MASKS)
    masks = MASKS.copy()
    masks[-1] = 0
    assert evaluate_sequence((frame[None] for frame in FEATURES), masks) == expected


def test_void_pixels_do_not_count() -> None:
    spoiled = MASKS.copy()
    spoiled[2, 3 * CELL : 4 * CELL] = 2  # a stripe that no prediction has
    with_stripe = evaluate_sequence(FEATURES, spoiled)
    spoiled[2, 3 * CELL : 4 * CELL] = 255
    assert with_stripe.j[1][1] < 0.5
    assert evaluate_sequence(FEATURES, spoiled).j == evaluate_sequence(FEATURES, MASKS).j


def test_the_mean_is_over_objects_not_over_clips() -> None:
    one = SequenceScores((1,), j=((1.0,),), f=((1.0,),))
    three = SequenceScores((1, 2, 5), j=((0.0,), (0.0,), (0.4,)), f=((0.0,), (0.0,), (0.0,)))
    assert three.per_object == pytest.approx([0.0, 0.0, 0.2])
    assert mean_over_objects([one, three]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("features", "masks", "annotated", "message"),
    [
        (FEATURES[:4], MASKS, None, "masks up to frame 4, but 4 feature maps"),
        (FEATURES, MASKS[:4], None, "masks up to frame 3, but 5 feature maps"),
        (FEATURES[:4], MASKS[[0, 2, 4]], [0, 2, 4], "masks up to frame 4, but 4 feature maps"),
        (FEATURES[:2], MASKS[:2], None, "first and the last frame of the clip's 2 do not"),
        (FEATURES, MASKS[[1, 3]], [1, 3], r"\(2, 48, 80\) for the frames \[1, 3\].* of frame 0"),
        (FEATURES, MASKS[[0, 3]], [0], r"\(2, 48, 80\) for the frames \[0\], .* one mask for each"),
        (FEATURES, MASKS[0], None, r"uint8 masks of shape \(48, 80\).* expected uint8 \(T, H, W"),
        (FEATURES, MASKS.astype(int), None, "int64 masks"),
        (FEATURES, MASKS * 0, None, "first mask has no object"),
    ],
)
def test_masks_that_cannot_be_scored(
    features: Any, masks: Any, annotated: list[int] | None, message: str
) -> None:
    with pytest.raises(FrameError, match=message):
        evaluate_sequence(features, masks, annotated=annotated)


def test_maps_of_another_shape_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"expected floating point \(C, h, w\)"):
        evaluate_sequence([torch.rand(2, 3, 6, 10)] * 5, MASKS)
