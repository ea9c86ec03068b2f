from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.closed_form import SOLVERS
from cosettle_adapter.training.model_selection import (
    Candidate,
    candidates,
    labels,
    layer_sets,
    pairs_with_last,
)


def test_the_upper_two_thirds_and_each_beside_the_last_are_the_default(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    singles = [(layer,) for layer in range(4, 12)]
    assert layer_sets(tiny_backbone) == singles + [(layer, 11) for layer in range(4, 11)]
    assert layer_sets(tiny_backbone, concatenations=()) == singles
    assert layer_sets(tiny_backbone, (7,)) == [(7,)]
    assert layer_sets(tiny_backbone, (-1, 3, 11), [(9, -5)]) == [(3,), (11,), (7, 9)]
    with pytest.raises(ValueError, match="no layers to choose from"):
        layer_sets(tiny_backbone, ())
    with pytest.raises(ValueError, match="has blocks 0 to 11"):
        layer_sets(tiny_backbone, (), [(7, 12)])


@given(depth=st.integers(1, 48))
def test_few_blocks_are_paired_with_the_last(depth: int) -> None:
    pairs = pairs_with_last(depth)
    lower = depth - 1 - depth // 3
    assert min(lower, 4) <= len(pairs) <= min(lower, 8)
    assert len(set(pairs)) == len(pairs)
    for earlier, last in pairs:
        assert depth // 3 <= earlier < last == depth - 1


def test_every_combination_is_a_candidate() -> None:
    default = candidates([(3,), (7, 9)])
    assert default == [Candidate((3,), "shrink", 1.0), Candidate((7, 9), "shrink", 1.0)]
    assert list(labels(default).values()) == ["3", "7+9"]
    every = candidates([(3,)], ("whiten", "surrogate"), ())
    listed = [each.strength for each in every if each.solver == "surrogate"]
    assert listed == list(SOLVERS["surrogate"].strengths)
    assert labels(every)[Candidate((3,), "whiten", 0.1)] == "3 whiten 0.1"
    assert len(candidates([(3,)], ("centre", "centre"), (1.0, 1.0))) == 1


def test_unknown_solvers_are_named() -> None:
    with pytest.raises(ValueError, match="unknown solver whitten; expected centre, shrink, "):
        candidates([(3,)], ("whiten", "whitten"))
    with pytest.raises(ValueError, match=r"unknown solver \(none\)"):
        candidates([(3,)], ())
