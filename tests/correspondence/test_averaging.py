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


def test_a_single_patch_and_no_share_change_nothing() -> None:
    alone, features = torch.randn(1, 4, 1, 1), torch.randn(1, 4, 5, 5)
    assert torch.equal(average_neighbours(alone, 0.3), alone)
    assert torch.equal(average_neighbours(features, 0.0), features)


def test_noise_falls_and_edges_stay() -> None:
    left, right = torch.eye(8)[:2]  # two objects, side by side
    clean = torch.stack([left] * 4 + [right] * 4, dim=1)[None, :, None].expand(1, 8, 6, 8)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    error = (average_neighbours(noisy, 0.5) - clean).square().mean()
    assert float(error) < 0.5 * float((noisy - clean).square().mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(dtype: torch.dtype) -> None:
    features = torch.randn(1, 8, 6, 6)
    found = average_neighbours(features.to(dtype), 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), average_neighbours(features, 0.3), rtol=0.1, atol=0.1)
