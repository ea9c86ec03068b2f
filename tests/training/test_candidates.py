from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.closed_form import SOLVERS
from cosettle_adapter.training.candidates import (
    Candidate,
    block_sets,
    candidates,
    labels,
    usual_concatenations,
)


def test_single_blocks_of_the_upper_two_thirds_are_the_default(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    assert block_sets(tiny_backbone) == [(layer,) for layer in range(4, 12)]
    assert block_sets(tiny_backbone, (-1, 3, 11), [(9, -5)]) == [(3,), (11,), (7, 9)]
    with pytest.raises(ValueError, match="no blocks to choose from"):
        block_sets(tiny_backbone, ())
    with pytest.raises(ValueError, match="has blocks 0 to 11"):
        block_sets(tiny_backbone, (), [(7, 12)])


def test_the_usual_concatenations() -> None:
    assert usual_concatenations(12) == [(6, 10), (5, 7, 9, 11), (8, 9, 10, 11)]


@given(depth=st.integers(1, 48))
def test_usual_concatenations_are_sets_of_upper_blocks(depth: int) -> None:
    for blocks in usual_concatenations(depth):
        assert 1 < len(blocks) <= 4
        assert list(blocks) == sorted(set(blocks))
        assert depth // 3 <= blocks[0]
        assert blocks[-1] < depth


def test_every_combination_is_a_candidate() -> None:
    default = candidates([(3,), (7, 9)])
    assert default == [Candidate((3,), "whiten", 1.0), Candidate((7, 9), "whiten", 1.0)]
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
