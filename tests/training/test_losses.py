from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_fakes import small_backbone

from cosettle_adapter.training.encoding import encode
from cosettle_adapter.training.errors import TrainingError
from cosettle_adapter.training.losses import (
    cycle_consistency_loss,
    objective,
    semantic_separability_loss,
)
from cosettle_adapter.training.settings import TrainSettings

from helpers import projection_for


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def pooled_by_hand(vectors: Tensor, grid: tuple[int, int], pool: int) -> list[Tensor]:
    """Means over windows of one frame ``(N, C)``, window by window."""
    h, w = grid
    nodes = []
    for top in range(0, h - pool + 1, pool):
        for left in range(0, w - pool + 1, pool):
            window = [vectors[(top + i) * w + left + j] for i in range(pool) for j in range(pool)]
            nodes.append(sum(window, torch.zeros_like(vectors[0])) / pool**2)
    return nodes


def walk_by_hand(path: list[list[Tensor]], temperature: float) -> list[list[float]]:
    """Chances to end at each node of the last frame, from each node of the first."""
    rows = []
    for start in range(len(path[0])):
        chances = [float(node == start) for node in range(len(path[0]))]
        for here, there in pairwise(path):
            arrived = [0.0] * len(there)
            for chance, node in zip(chances, here, strict=True):
                weights = [math.exp(float(node @ other) / temperature) for other in there]
                for index, weight in enumerate(weights):
                    arrived[index] += chance * weight / sum(weights)
            chances = arrived
        rows.append(chances)
    return rows


def loss_by_hand(rows: list[list[float]]) -> tuple[float, float]:
    losses, hits = [], []
    for start, chances in enumerate(rows):
        logits = [math.log(chance + 1e-6) for chance in chances]
        losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[start])
        hits.append(logits.index(max(logits)) == start)
    return sum(losses) / len(losses), sum(hits) / len(hits)


def cycles_by_hand(
    forward: Tensor, backward: Tensor, grid: tuple[int, int], temperature: float, pool: int
) -> tuple[float, float]:
    found = []
    for clip, perturbed in zip(forward, backward, strict=True):
        out = [pooled_by_hand(frame, grid, pool) for frame in clip]
        back = [pooled_by_hand(frame, grid, pool) for frame in perturbed]
        for k in range(2, len(out) + 1):
            path = out[:k] + back[: k - 1][::-1]
            found.append(loss_by_hand(walk_by_hand(path, temperature)))
    return tuple(sum(each) / len(found) for each in zip(*found, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("grid", "pool", "temperature", "frames"),
    [((4, 6), 2, 0.03, 2), ((5, 7), 2, 0.1, 3), ((6, 6), 3, 0.03, 2), ((2, 3), 1, 0.07, 4)],
)
def test_the_cycle_loss_equals_its_definition(
    grid: tuple[int, int], pool: int, temperature: float, frames: int
) -> None:
    cells = math.prod(grid)
    forward = unit(2, frames, cells, 5)
    backward = F.normalize(forward[:, :-1] + 0.3 * unit(2, frames - 1, cells, 5, seed=2), dim=-1)
    expected = cycles_by_hand(forward, backward, grid, temperature, pool)
    found = cycle_consistency_loss(forward, backward, grid, temperature, pool)
    assert [each.dtype for each in found] == [torch.float64] * 2
    assert [float(each) for each in found] == pytest.approx(expected, abs=1e-9)
    single = cycle_consistency_loss(forward.float(), backward.float(), grid, temperature, pool)
    assert [each.dtype for each in single] == [torch.float32] * 2
    assert [float(each) for each in single] == pytest.approx(expected, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 10, 8), (3, 6)])
def test_the_separability_loss_equals_its_definition(shape: tuple[int, ...]) -> None:
    original, projected = unit(*shape), unit(*shape, seed=1)
    total = 0.0
    for one, other in zip(original.flatten(0, -2), projected.flatten(0, -2), strict=True):
        p, q = ([math.exp(float(value)) for value in vector] for vector in (one, other))
        for a, b in zip(p, q, strict=True):
            total += a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q)))
    found = semantic_separability_loss(original, projected)
    assert float(found) == pytest.approx(total / len(original), abs=1e-12)
    single = semantic_separability_loss(original.float(), projected.float())
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(total / len(original), abs=1e-6)


def test_near_identity_the_separability_loss_counts_angles() -> None:
    """0.766 (1 - cos) at width 768 and 3 views of 196 tokens: 588 tokens / 768 channels."""
    original = unit(2, 3, 196, 768)
    projected = F.normalize(original + 0.3 * unit(2, 3, 196, 768, seed=1), dim=-1)
    angle = float(1 - (original * projected).sum(-1).mean())
    found = float(semantic_separability_loss(original, projected))
    # the softmax does not see what all channels have in common: one dimension of 768 less
    assert found / angle == pytest.approx(588 / 768 * (1 - 1 / 768), rel=3e-4)


# The objective --------------------------------------------------------------------------------

PAPER = TrainSettings()
GRID = (4, 4)


def tokens_for(clips: int = 3, length: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(clips, 2 * length - 1, 16, 8, generator=generator)


@pytest.mark.parametrize("length", [2, 3])
def test_the_total_is_the_papers(length: int) -> None:
    tokens, head = tokens_for(length=length), nn.Linear(8, 8)
    settings = dataclasses.replace(PAPER, frames=length)
    found = objective(head, tokens, GRID, settings)
    projected = F.normalize(head(tokens), dim=-1)
    forward, backward = projected[:, :length], projected[:, length:]
    cycle, accuracy = cycle_consistency_loss(forward, backward, GRID, 0.03)
    separability = semantic_separability_loss(F.normalize(tokens, dim=-1), projected)
    expected = (cycle + 3 * separability, cycle, separability, accuracy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    off = objective(head, tokens[:, :length], GRID, dataclasses.replace(settings, pea="off"))
    same = torch.cat([tokens[:, :length], tokens[:, : length - 1]], dim=1)
    on = objective(head, same, GRID, settings)
    assert off == on, "without perturbation, the way back sees the same tokens"
    with pytest.raises(TrainingError, match="pool must be at most 4 on a grid of 4 x 4 patches"):
        objective(head, tokens, GRID, dataclasses.replace(settings, pool=5))


def test_the_mean_squared_error_is_over_all_channels_of_unit_tokens() -> None:
    """``forward_mse_loss`` of the official code, which its MAE alone uses."""
    tokens, head = tokens_for(), nn.Linear(8, 8).requires_grad_(False)
    settings = dataclasses.replace(PAPER, reg_loss="mse")
    found = objective(head, tokens, GRID, settings)
    apart, count = 0.0, 0
    for one, other in zip(tokens.flatten(0, 2), head(tokens).flatten(0, 2), strict=True):
        lengths = [math.sqrt(sum(float(value) ** 2 for value in each)) for each in (one, other)]
        for a, b in zip(one, other, strict=True):
            apart += (float(a) / lengths[0] - float(b) / lengths[1]) ** 2
            count += 1
    assert float(found.separability) == pytest.approx(apart / count, rel=1e-5)
    assert float(found.total) == pytest.approx(float(found.cycle) + 3 * apart / count, rel=1e-5)
    assert found.cycle == objective(head, tokens, GRID, PAPER).cycle


def test_the_head_is_called_once_and_without_waiting_for_the_device() -> None:
    calls: list[tuple[int, ...]] = []

    def head(tokens: Tensor) -> Tensor:
        calls.append(tuple(tokens.shape))
        return tokens

    with Looks() as looks:
        losses = objective(head, tokens_for(3, 3), GRID, dataclasses.replace(PAPER, frames=3))
    assert (looks.count, calls) == (0, [(3, 5, 16, 8)])
    assert float(losses.separability) == pytest.approx(0, abs=1e-6)


class Looks(TorchDispatchMode):
    """Counts how often a value is brought to Python, for which it waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inference", [True, False])
def test_gradients_reach_only_the_head(inference: bool) -> None:
    backbone = small_backbone()
    head = projection_for(backbone)  # type: ignore[arg-type]
    head.requires_grad_(True)
    frames = torch.rand(2, 2, 3, 64, 64).requires_grad_()
    with torch.inference_mode(inference):
        tokens = encode(backbone, PAPER, frames, torch.arange(2), step=0)
    objective(head.project, tokens, GRID, PAPER).total.backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
    assert frames.grad is None
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_and_autocast_give_float32_losses(dtype: torch.dtype) -> None:
    head, halves = nn.Linear(8, 8), tokens_for().to(dtype)
    expected = objective(head, halves.float(), GRID, PAPER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(head, halves, GRID, PAPER)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
