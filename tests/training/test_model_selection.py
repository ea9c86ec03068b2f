from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.closed_form import SOLVERS
from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.training.model_selection import (
    Candidate,
    candidates,
    labels,
    layer_sets,
    mask_overlap,
    pairs_with_last,
)
from cosettle_adapter.video.synthetic import render_clip


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


@given(seed=st.integers(0, 100))
@settings(max_examples=5, deadline=None)
def test_overlap_is_that_of_the_strongest_label(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    photos = torch.randint(0, 256, (2, 3, 60, 80), dtype=torch.uint8, generator=generator)
    clip = render_clip(photos[0], cutout=photos[1], frames=4, size=(48, 64), seed=seed)
    masks = clip.object_mask
    assert masks is not None
    # rounded, so that many cells tie
    features = torch.randn(4, 2, 6, 8, generator=generator).round()
    first = torch.stack([~masks[0], masks[0]]).float()
    labels = F.interpolate(first[None], (6, 8), mode="bilinear", align_corners=False)[0]
    shares = F.interpolate(propagate_labels(features, labels), (48, 64), mode="bilinear")
    found = shares.argmax(1) == 1
    expected = [
        float((mine & true).sum() / (mine | true).sum().clamp_min(1))
        for mine, true in zip(found[1:], masks[1:], strict=True)
    ]
    assert mask_overlap(features, clip) == pytest.approx(sum(expected) / len(expected))


def test_overlap_is_high_where_features_follow_the_object() -> None:
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (2, 3, 300, 400), dtype=torch.uint8, generator=generator)
    clip = render_clip(photos[0], cutout=photos[1], frames=4, size=(96, 128), seed=1)
    assert clip.object_mask is not None
    cells = torch.nn.functional.avg_pool2d(clip.object_mask[:, None].float(), 4)
    perfect = torch.cat([cells, 1 - cells], dim=1)
    assert mask_overlap(perfect, clip) > 0.7
    blind = torch.ones(4, 2, 24, 32)
    assert mask_overlap(blind, clip) < mask_overlap(perfect, clip)
    with pytest.raises(ValueError, match="no moving object"):
        mask_overlap(perfect, render_clip(photos[0], frames=4, size=(96, 128)))
