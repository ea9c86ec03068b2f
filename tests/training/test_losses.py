from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_fakes import small_backbone

from cosettle_adapter.training.encoding import Views, encode_views
from cosettle_adapter.training.losses import (
    cycle_consistency_loss,
    objective,
    semantic_separability_loss,
)
from cosettle_adapter.training.settings import ObjectiveSettings

from helpers import projection_for


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def cycle(
    x1: Tensor, x2: Tensor, x1_perturbed: Tensor, *rest: object, **named: object
) -> tuple[Tensor, Tensor]:
    """The loss of two frames ``(B, N, C)``, as the paper words it."""
    forward = torch.stack([x1, x2], dim=1)
    return cycle_consistency_loss(forward, x1_perturbed[:, None], *rest, **named)  # type: ignore[arg-type]


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
    ("grid", "pool", "temperature"),
    [((4, 6), 2, 0.03), ((5, 7), 2, 0.1), ((6, 6), 3, 0.03), ((3, 4), 1, 0.07)],
)
def test_the_cycle_loss_equals_its_definition(
    grid: tuple[int, int], pool: int, temperature: float
) -> None:
    cells = math.prod(grid)
    x1, x2 = unit(2, cells, 5), unit(2, cells, 5, seed=1)
    perturbed = F.normalize(x1 + 0.3 * unit(2, cells, 5, seed=2), dim=-1)
    expected = cycles_by_hand(torch.stack([x1, x2], 1), perturbed[:, None], grid, temperature, pool)
    found = cycle(x1, x2, perturbed, grid, temperature, pool)
    assert [each.dtype for each in found] == [torch.float64] * 2
    assert [float(each) for each in found] == pytest.approx(expected, abs=1e-9)
    single = cycle(x1.float(), x2.float(), perturbed.float(), grid, temperature, pool)
    assert [each.dtype for each in single] == [torch.float32] * 2
    assert [float(each) for each in single] == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_the_papers_sizes_are_the_defaults() -> None:
    x1, x2, perturbed = (unit(1, 196, 768, seed=seed) for seed in range(3))
    expected = cycles_by_hand(torch.stack([x1, x2], 1), perturbed[:, None], (14, 14), 0.03, 2)
    found = cycle(x1.float(), x2.float(), perturbed.float(), (14, 14))
    assert [float(each) for each in found] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_cycles_over_several_frames_equal_their_definition(frames: int) -> None:
    forward, backward = unit(2, frames, 16, 6), unit(2, frames - 1, 16, 6, seed=1)
    found = cycle_consistency_loss(forward, backward, (4, 4), 0.1)
    expected = cycles_by_hand(forward, backward, (4, 4), 0.1, 2)
    assert [float(each) for each in found] == pytest.approx(expected, abs=1e-9)


def test_odd_sides_leave_the_last_row_and_column_out() -> None:
    cells = [unit(2, 5, 7, 4, seed=seed) for seed in range(3)]
    flat = [each.flatten(1, 2) for each in cells]
    whole = [each[:, :4, :6].flatten(1, 2) for each in cells]
    assert cycle(*flat, (5, 7)) == cycle(*whole, (4, 6))  # type: ignore[arg-type]


def test_distinct_places_that_stay_come_back() -> None:
    places = torch.eye(16, dtype=torch.float64)[None]
    loss, accuracy = cycle(places, places, places, (4, 4), pool=1)
    assert float(accuracy) == 1
    assert float(loss) == pytest.approx(0, abs=1e-4)
    turned = places.roll(1, dims=1)
    loss, accuracy = cycle(places, places, turned, (4, 4), pool=1)
    assert float(accuracy) == 0
    assert float(loss) == pytest.approx(-math.log(1e-6), rel=0.01)
    # any order of the frame in between is fine
    assert float(cycle(places, turned, places, (4, 4), pool=1)[1]) == 1


def test_random_vectors_come_back_by_chance() -> None:
    x1, x2, perturbed = (unit(60, 196, 64, seed=seed, dtype=torch.float32) for seed in range(3))
    _, accuracy = cycle(x1, x2, perturbed, (14, 14))
    chance, places = 1 / 49, 60 * 49
    assert float(accuracy) == pytest.approx(chance, abs=4 * math.sqrt(chance / places))


def test_the_cycle_losses_gradients() -> None:
    vectors = [0.9 * unit(1, 16, 3, seed=seed) for seed in range(3)]
    inputs = [each.requires_grad_() for each in vectors]
    assert torch.autograd.gradcheck(lambda *given: cycle(*given, (4, 4), 0.3)[0], inputs)


def separability_by_hand(original: Tensor, projected: Tensor) -> float:
    total = 0.0
    for one, other in zip(original.flatten(0, -2), projected.flatten(0, -2), strict=True):
        p = [math.exp(float(value)) for value in one]
        q = [math.exp(float(value)) for value in other]
        total += sum(
            a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q)))
            for a, b in zip(p, q, strict=True)
        )
    return total / len(original)


@pytest.mark.parametrize("shape", [(2, 3, 10, 8), (4, 7, 5), (3, 6)])
def test_the_separability_loss_equals_its_definition(shape: tuple[int, ...]) -> None:
    original, projected = unit(*shape), unit(*shape, seed=1)
    expected = separability_by_hand(original, projected)
    assert float(semantic_separability_loss(original, projected)) == pytest.approx(
        expected, abs=1e-12
    )
    single = semantic_separability_loss(original.float(), projected.float())
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_near_identity_the_separability_loss_counts_angles(noise: float) -> None:
    """0.766 (1 - cos) at width 768 and 3 views of 196 tokens: 588 tokens / 768 channels."""
    original = unit(2, 3, 196, 768)
    projected = F.normalize(original + noise * unit(2, 3, 196, 768, seed=1), dim=-1)
    angle = float(1 - (original * projected).sum(-1).mean())
    found = float(semantic_separability_loss(original, projected))
    assert found / angle == pytest.approx(0.766, abs=0.0015)
    # the softmax does not see what all channels have in common: one dimension of 768 less
    assert found / angle == pytest.approx(588 / 768 * (1 - 1 / 768), rel=3e-4)
    single = float(semantic_separability_loss(original.float(), projected.float()))
    assert single == pytest.approx(found, abs=5e-6)
    views = [
        float(semantic_separability_loss(original[:, view], projected[:, view]))
        for view in range(3)
    ]
    assert found == pytest.approx(sum(views))


def test_half_precision_and_autocast_compute_in_float32() -> None:
    vectors = [unit(2, 16, 32, seed=seed, dtype=torch.float32) for seed in range(3)]
    plain = cycle(*vectors, (4, 4))  # type: ignore[arg-type]
    kl = semantic_separability_loss(*vectors[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cycle(*vectors, (4, 4)) == plain  # type: ignore[arg-type]
        assert torch.equal(semantic_separability_loss(*vectors[:2]), kl)
    halves = [each.half() for each in vectors]
    loss, _ = cycle(*halves, (4, 4))  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(plain[0]), rel=0.01)


def test_what_is_not_a_number_stays_so() -> None:
    """Training stops at a loss that is not finite, and names the batch."""
    vectors = [unit(1, 16, 4, seed=seed) for seed in range(3)]
    vectors[1][0, 3] = math.nan
    assert math.isnan(cycle(*vectors, (4, 4))[0])  # type: ignore[arg-type]


FORWARD, BACKWARD = unit(2, 2, 16, 4), unit(2, 1, 16, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backward": unit(2, 2, 16, 4)}, r"\(B, T, N, C\) with T of 2 or more and backward"),
        ({"forward": unit(2, 1, 16, 4)}, r"got \(2, 1, 16, 4\) and \(2, 1, 16, 4\)"),
        ({"forward": FORWARD[0]}, r"got \(2, 16, 4\)"),
        ({"forward": FORWARD[:0]}, r"expected forward \(B, \.\.\., C\), got \(0, 2, 16, 4\)"),
        ({"grid": (4, 5)}, "expected 20 vectors for a grid of 4 x 5, got 16"),
        ({"forward": FORWARD * 30}, r"forward as unit vectors, got one of length 30: .* F\.norm"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive, got nan"),
        ({"pool": 5}, "pool must be a whole number from 1 to 4, got 5"),
        ({"pool": 1.5}, "got 1.5"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    arguments = {"forward": FORWARD, "backward": BACKWARD, "grid": (4, 4), **changes}
    with pytest.raises(ValueError, match=message):
        cycle_consistency_loss(**arguments)  # type: ignore[arg-type]


def test_vectors_that_are_no_vectors() -> None:
    with pytest.raises(TypeError, match="backward as a floating-point tensor, got list"):
        cycle_consistency_loss(FORWARD, [1.0], (4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"original as a floating-point tensor, got torch\.int64"):
        semantic_separability_loss(torch.zeros(2, 3, dtype=torch.int64), FORWARD)
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 2, 16, 4\) and \(2, 16, 3\)"):
        semantic_separability_loss(FORWARD, unit(2, 16, 3))
    with pytest.raises(ValueError, match="projected as unit vectors"):
        semantic_separability_loss(FORWARD, 2 * FORWARD)


# The objective --------------------------------------------------------------------------------

PAPER = ObjectiveSettings()


def views_for(clips: int = 3, length: int = 2) -> Views:
    generator = torch.Generator().manual_seed(0)
    tokens = 5 * torch.randn(clips, 2 * length - 1, 16, 8, generator=generator)
    return Views(tokens[:, :length], tokens[:, length:], (4, 4))


@pytest.mark.parametrize("length", [2, 3])
def test_the_total_is_the_papers(length: int) -> None:
    views, head = views_for(length=length), nn.Linear(8, 8)
    found = objective(head, views, PAPER)
    forward, backward = (
        F.normalize(head(each), dim=-1) for each in (views.forward, views.backward)
    )
    cycle, accuracy = cycle_consistency_loss(forward, backward, (4, 4), 0.03)
    originals = F.normalize(torch.cat([views.forward, views.backward], dim=1), dim=-1)
    separability = semantic_separability_loss(originals, torch.cat([forward, backward], dim=1))
    torch.testing.assert_close(found.cycle, cycle)
    torch.testing.assert_close(found.separability, separability)
    torch.testing.assert_close(found.accuracy, accuracy)
    torch.testing.assert_close(found.total, cycle + 3 * separability)
    assert all(each.shape == () for each in vars(found).values())


def test_several_temperatures_are_averaged() -> None:
    views, head = views_for(), nn.Linear(8, 8)
    apart = [
        objective(head, views, ObjectiveSettings(temperatures=(temperature,)))
        for temperature in (0.03, 0.1, 0.5)
    ]
    both = objective(head, views, ObjectiveSettings(temperatures=(0.03, 0.1, 0.5)))
    torch.testing.assert_close(both.cycle, torch.stack([each.cycle for each in apart]).mean())
    torch.testing.assert_close(both.accuracy, torch.stack([each.accuracy for each in apart]).mean())
    torch.testing.assert_close(both.separability, apart[0].separability)


def test_the_head_is_called_once() -> None:
    calls: list[tuple[int, ...]] = []

    def head(tokens: Tensor) -> Tensor:
        calls.append(tuple(tokens.shape))
        return tokens

    losses = objective(head, views_for(3, 3), PAPER)
    assert calls == [(3, 5, 16, 8)]
    assert float(losses.separability) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("inference", [True, False])
def test_gradients_reach_only_the_head(inference: bool) -> None:
    backbone = small_backbone()
    head = projection_for(backbone)  # type: ignore[arg-type]
    head.requires_grad_(True)
    frames = torch.rand(2, 2, 3, 64, 64).requires_grad_()
    with torch.inference_mode(inference):
        views = encode_views(
            backbone, frames, layers=(1,), norm=None, settings=PAPER, offsets=torch.rand(1, 2)
        )
    objective(head.project, views, PAPER).total.backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
    assert frames.grad is None
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_two_halves_average_to_the_whole() -> None:
    views, head = views_for(4), nn.Linear(8, 8)

    def gradient(*parts: Views) -> Tensor:
        head.zero_grad()
        for part in parts:
            (objective(head, part, PAPER).total / len(parts)).backward()
        assert head.weight.grad is not None
        return head.weight.grad.clone()

    halves = [
        views._replace(forward=views.forward[part], backward=views.backward[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(gradient(*halves), gradient(views), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_and_autocast_give_float32_losses(dtype: torch.dtype) -> None:
    head, exact = nn.Linear(8, 8), views_for()
    halves = Views(exact.forward.to(dtype), exact.backward.to(dtype), exact.grid)
    expected = objective(
        head, Views(halves.forward.float(), halves.backward.float(), exact.grid), PAPER
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(head, halves, PAPER)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_a_head_that_changes_the_width() -> None:
    views, head = views_for(), nn.Linear(8, 4)
    with pytest.raises(ValueError, match="the head makes 4 of 8: keep the width, or set"):
        objective(head, views, PAPER)
    alone = objective(head, views, ObjectiveSettings(separability_weight=0))
    assert float(alone.separability) == 0
    assert torch.equal(alone.total, alone.cycle)
    watched = objective(nn.Linear(8, 8), views, ObjectiveSettings(separability_weight=0))
    assert float(watched.separability.detach()) > 0
    assert torch.equal(watched.total, watched.cycle)


class Looks(TorchDispatchMode):
    """Counts how often a value is brought to Python, for which it waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_objective_does_not_wait_for_the_device() -> None:
    views = views_for()
    with Looks() as looks:
        objective(nn.Linear(8, 8), views, PAPER)
    assert looks.count == 0
    with Looks() as looks, pytest.raises(ValueError, match="as unit vectors"):
        cycle_consistency_loss(views.forward, views.backward, views.grid)
    assert looks.count == 1
