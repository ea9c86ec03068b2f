from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation import (
    SequenceScores,
    boundary_f,
    evaluate_sequence,
    mean_over_objects,
    region_similarity,
)

CELL = 8


def moving_squares(frames: int = 5, h: int = 6, w: int = 10) -> tuple[Tensor, NDArray[np.uint8]]:
    """Two objects that move one cell a frame, and features that know which cell is which."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.randn(32, h, w, generator=generator)
    objects = torch.randn(2, 32, 2, 2, generator=generator)
    features = ground.repeat(frames, 1, 1, 1)
    masks = np.zeros((frames, h * CELL, w * CELL), dtype=np.uint8)
    for t in range(frames):
        for index, (row, column) in enumerate([(0, t), (4, w - 2 - t)]):
            features[t, :, row : row + 2, column : column + 2] = objects[index]
            rows = slice(row * CELL, (row + 2) * CELL)
            columns = slice(column * CELL, (column + 2) * CELL)
            masks[t, rows, columns] = index + 1
    return features, masks


@pytest.mark.parametrize("protocol", ["crw", "dino"])
def test_features_that_know_the_motion_score_perfectly(protocol: str) -> None:
    features, masks = moving_squares()
    scores = evaluate_sequence(features, masks, protocol=protocol, topk=1)  # type: ignore[arg-type]
    assert scores.objects == (1, 2)
    assert [len(values) for values in scores.j] == [3, 3]
    assert scores.j_and_f > 0.8  # corners are rounded on the way through the grid


def test_still_features_score_what_the_first_mask_scores() -> None:
    _, masks = moving_squares()
    still = torch.randn(1, 8, 6, 10).expand(5, -1, -1, -1)
    scores = evaluate_sequence(still, masks, topk=1)
    for index, object_id in enumerate(scores.objects):
        first = masks[0] == object_id
        assert scores.j[index] == pytest.approx(
            [region_similarity(masks[t] == object_id, first) for t in (1, 2, 3)], abs=0.1
        )
        assert scores.f[index] == pytest.approx(
            [boundary_f(masks[t] == object_id, first) for t in (1, 2, 3)], abs=0.1
        )


def test_first_and_last_frame_do_not_count() -> None:
    features, masks = moving_squares()
    expected = evaluate_sequence(features, masks)
    masks[-1] = 0
    assert evaluate_sequence(features, masks) == expected


def test_maps_may_stream() -> None:
    features, masks = moving_squares()
    stream = (frame[None] for frame in features)
    assert evaluate_sequence(stream, masks) == evaluate_sequence(features, masks)


def test_void_pixels_do_not_count() -> None:
    features, masks = moving_squares()
    spoiled = masks.copy()
    spoiled[2, 3 * CELL : 4 * CELL] = 2  # a stripe that no prediction has
    with_stripe = evaluate_sequence(features, spoiled)
    spoiled[2, 3 * CELL : 4 * CELL] = 255
    assert with_stripe.j[1][1] < 0.5
    assert evaluate_sequence(features, spoiled).j == evaluate_sequence(features, masks).j


def test_the_mean_is_over_objects_not_over_clips() -> None:
    one = SequenceScores((1,), j=((1.0,),), f=((1.0,),))
    three = SequenceScores((1, 2, 5), j=((0.0,), (0.0,), (0.4,)), f=((0.0,), (0.0,), (0.0,)))
    assert three.per_object == pytest.approx([0.0, 0.0, 0.2])
    assert mean_over_objects([one, three]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("maps", "message"),
    [(4, "but 4 feature maps"), (7, "but more feature maps")],
)
def test_every_mask_needs_a_map(maps: int, message: str) -> None:
    features, masks = moving_squares(frames=7)
    with pytest.raises(FrameError, match=message):
        evaluate_sequence(features[:maps], masks[:5])


def test_wrong_masks_say_what_was_expected() -> None:
    features, masks = moving_squares()
    with pytest.raises(FrameError, match="first and the last frame of the clip's 2 do not"):
        evaluate_sequence(features[:2], masks[:2])
    with pytest.raises(FrameError, match=r"2 masks for the frames \[1, 3\].*first is frame 0"):
        evaluate_sequence(features, masks[[1, 3]], annotated=[1, 3])
    with pytest.raises(FrameError, match=r"uint8 masks of shape \(48, 80\), expected"):
        evaluate_sequence(features, masks[0])
    with pytest.raises(FrameError, match="int64 masks"):
        evaluate_sequence(features, masks.astype(np.int64))  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="first mask has no object"):
        evaluate_sequence(features, masks * 0)
    with pytest.raises(GeometryError, match="expected \\(C, h, w\\)"):
        evaluate_sequence([torch.rand(2, 3, 6, 10)] * 5, masks)
