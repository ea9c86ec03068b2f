from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter.correspondence import propagate_labels
from cosettle_adapter.training.model_selection import mask_overlap
from cosettle_adapter.video.rendered import render_clip


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
