from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.visualization import colour_scale, distinct_colours

# Machado et al. 2009, severity 1, on linear RGB
BLINDNESS = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "none": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_objects_can_be_told_apart_without_seeing_red_or_green(kind: str) -> None:
    linear = (distinct_colours(7) / 255).float() ** 2.2
    seen = (linear @ torch.tensor(BLINDNESS[kind]).T).clamp(0, 1) ** (1 / 2.2)
    closest = min(float((a - b).norm()) for a, b in itertools.combinations(seen, 2))
    assert closest > 0.12


@given(count=st.integers(0, 60))
def test_every_thing_has_a_colour_of_its_own(count: int) -> None:
    colours = distinct_colours(count)
    assert colours.shape == (count, 3)
    assert colours.dtype == torch.uint8
    assert len({tuple(colour) for colour in colours.tolist()}) == count


def test_a_negative_number_of_colours_is_refused() -> None:
    with pytest.raises(ValueError, match="count=-1"):
        distinct_colours(-1)


def test_the_scale_becomes_lighter_all_the_way() -> None:
    values = torch.linspace(0, 1, 101)
    lightness = colour_scale(values).float() @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 0).all()
    assert lightness[0] < 2
    assert lightness[-1] > 240


def test_the_scale_has_no_colours_beyond_its_ends() -> None:
    beyond = colour_scale(torch.tensor([[-3.0, 0.0], [1.0, 9.0]]))
    assert beyond.shape == (2, 2, 3)
    assert torch.equal(beyond[0, 0], beyond[0, 1])
    assert torch.equal(beyond[1, 0], beyond[1, 1])
