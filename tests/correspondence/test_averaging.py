"""Averaging within a frame, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.correspondence import average_neighbours


def _defined(frame: Tensor, share: float) -> Tensor:
    """One patch after the other, as the docstring says."""
    _, height, width = frame.shape
    result = frame.clone()
    for row in range(height):
        for column in range(width):
            near = [
                (y, x)
                for y in range(height)
                for x in range(width)
                if 0 < (y - row) ** 2 + (x - column) ** 2 <= 9
            ]
            others = torch.stack([frame[:, y, x] for y, x in near])
            cosine = F.cosine_similarity(others, frame[None, :, row, column])
            best = cosine.topk(min(5, len(near)))
            mean = torch.softmax(best.values / 0.1, 0) @ others[best.indices]
            result[:, row, column] = (1 - share) * frame[:, row, column] + share * mean
    return result


@pytest.mark.parametrize("grid", [(7, 11), (2, 2), (1, 9), (13, 4)])
def test_it_equals_its_definition_in_every_frame(grid: tuple[int, int]) -> None:
    features = torch.randn(2, 6, *grid)
    found = average_neighbours(features, 0.3)
    torch.testing.assert_close(found, torch.stack([_defined(frame, 0.3) for frame in features]))


def test_a_single_patch_and_no_share_change_nothing_and_the_dtype_is_kept() -> None:
    alone, features = torch.randn(1, 4, 1, 1), torch.randn(1, 8, 6, 6)
    assert torch.equal(average_neighbours(alone, 0.3), alone)
    assert torch.equal(average_neighbours(features, 0.0), features)
    found = average_neighbours(features.bfloat16(), 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), average_neighbours(features, 0.3), rtol=0.1, atol=0.1)
