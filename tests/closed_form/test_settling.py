from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import reduce
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cosettle_adapter.closed_form import Settler, StatisticsError, apply_to_maps, settle_clip

WIDTH = 12


def moving(frames: int, *, seed: int = 0, noise: float = 1.0) -> torch.Tensor:
    """Features (T, C, 5, 6) that move over the grid; the first two channels flicker."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(WIDTH, 5, 6, generator=generator)
    shifted = torch.stack([torch.roll(first, t, dims=2) for t in range(frames)])
    shifted[:, :2] += noise * torch.randn(frames, 2, 5, 6, generator=generator)
    shifted[:, 2:] += 0.1 * torch.randn(frames, WIDTH - 2, 5, 6, generator=generator)
    return shifted + 3


def settled_by(clip: torch.Tensor, **options: float) -> Settler:
    settler = Settler(WIDTH, **options)
    settler.update(clip)
    return settler


def test_no_frames_change_nothing() -> None:
    found = Settler(WIDTH).solution()
    tokens = torch.randn(7, WIDTH)
    assert torch.equal(found(tokens), tokens)
    assert Settler(WIDTH).settle(torch.empty(0, WIDTH, 5, 6)).shape == (0, WIDTH, 5, 6)


def test_one_frame_or_still_frames_are_only_centred() -> None:
    frame = moving(1)
    centred = frame - reduce(frame, "t c h w -> 1 c 1 1", "mean")
    torch.testing.assert_close(settle_clip(frame), centred, atol=1e-5, rtol=0)
    still = frame.expand(9, -1, -1, -1)
    expected = centred.expand(9, -1, -1, -1)
    torch.testing.assert_close(settle_clip(still), expected, atol=1e-5, rtol=0)
    assert settle_clip(moving(3).bfloat16()).dtype == torch.bfloat16


def test_the_solution_is_what_it_says() -> None:
    settler = settled_by(moving(6), prior_pairs=50, ridge=0.5)
    found = settler.solution()
    blended = torch.linalg.inv(found.weight @ found.weight)
    mean = reduce(moving(6).double(), "t c h w -> c", "mean")
    torch.testing.assert_close(found.bias, -found.weight @ mean, atol=1e-4, rtol=0)
    # (P + r s I) / ((1 + r) s) has trace C, and n S / s takes the share n / (n + n0) of P / s
    assert float(blended.trace()) == pytest.approx(WIDTH, rel=1e-6)
    share = settler.pairs / (settler.pairs + 50)
    least = (1 - share + 0.5) / 1.5
    values = torch.linalg.eigvalsh(blended)
    assert least - 1e-6 <= float(values[0]) < least + 0.1
    intra = blended * 1.5 - (1.5 - share) * torch.eye(WIDTH).double()
    assert float(intra[:2, :2].trace() / intra.trace()) > 0.9


@given(prior=st.floats(0, 1e6), ridge=st.floats(0.05, 100))
@hypothesis_settings(max_examples=10)
def test_the_more_prior_or_ridge_the_closer_to_centring(prior: float, ridge: float) -> None:
    clip = moving(8)

    def departure(**options: float) -> float:
        weight = settled_by(clip, **options).solution().weight
        return float((weight - torch.eye(WIDTH)).norm())

    before = departure(prior_pairs=prior, ridge=ridge)
    assert departure(prior_pairs=2 * prior + 1, ridge=ridge) <= before
    assert departure(prior_pairs=prior, ridge=2 * ridge) <= before
    assert departure(prior_pairs=prior, ridge=math.inf) == 0


@given(cuts=st.lists(st.integers(0, 23), max_size=4))
@hypothesis_settings(max_examples=8)
def test_how_frames_are_split_over_calls_does_not_matter(cuts: list[int]) -> None:
    clip = moving(24)
    whole = Settler(WIDTH, forgetting=0.9)
    expected = whole.settle(clip)
    parts = Settler(WIDTH, forgetting=0.9)
    edges = [0, *sorted(cuts), 24]
    pieces = [parts.settle(clip[a:b]) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.solution().weight, whole.solution().weight)
    for t in range(7):  # at first, every frame is settled by all that came
        solution = settled_by(clip[: t + 1], forgetting=0.9).solution()
        settled = apply_to_maps(solution, clip[t : t + 1])
        torch.testing.assert_close(expected[t : t + 1], settled, atol=1e-5, rtol=0)


def test_forgetting_forgets_and_frames_of_another_size_begin_anew() -> None:
    before, after = moving(30), moving(30, seed=5) - 7
    forgetful = settled_by(torch.cat([before, after]), forgetting=0.7)
    mean = reduce(after.double(), "t c h w -> c", "mean")
    assert float(forgetful.solution()(mean).norm()) < 0.2
    assert float(settled_by(torch.cat([before, after])).solution()(mean).norm()) > 5
    assert forgetful.pairs < 30 / 0.3
    settler = settled_by(moving(4))
    pairs = settler.pairs
    settler.update(moving(1)[..., :4, :4])
    assert settler.pairs == pairs
    assert settler.frames == 5


def test_wrong_features_and_options_are_errors() -> None:
    with pytest.raises(ValueError, match=r"expected features \(N, 12, h, w\), got \(3, 5, 4, 4\)"):
        Settler(WIDTH).update(torch.zeros(3, 5, 4, 4))
    broken = moving(2)
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="features of frame 1 are not finite"):
        Settler(WIDTH).update(broken)
    for name, value in (("ridge", 0.0), ("prior_pairs", -1.0), ("forgetting", 0.0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Settler(WIDTH, **{name: value})
