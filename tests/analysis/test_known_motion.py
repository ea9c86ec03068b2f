"""Real pixels, real features, exactly known motion: tracking error that needs no data set."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.analysis import compare_features, tracking_error
from cosettle_adapter.video.photographs import photographs
from cosettle_adapter.video.rendered import render_clip

SIDES = (196, 280)


@pytest.mark.parametrize("motion", ["pan", "zoom", "rotate"])
def test_points_of_a_photograph_are_followed_to_a_few_pixels(
    motion: str, real_adapter: CoSettleAdapter
) -> None:
    clip = render_clip(
        photographs()["astronaut"], frames=5, size=SIDES, motion=motion, amount=0.25, seed=0
    )
    geometry = real_adapter.geometry(*SIDES)
    points = rearrange(geometry.cell_centers()[3:-3, 3:-3], "h w xy -> (h w) xy")
    positions, visible = clip.track(points)
    moved = (positions[-1] - positions[0]).norm(dim=-1).median()
    assert float(moved) > 8, "there is motion to follow"
    errors = {
        kind: tracking_error(features, geometry, points, positions, visible)["median"]
        for kind, features in compare_features(real_adapter, clip.frames).items()
    }
    torch.manual_seed(0)
    noise = torch.randn(5, 8, *geometry.grid)
    chance = tracking_error(noise, geometry, points, positions, visible)["median"]
    assert errors["adapted"] < real_adapter.backbone.patch, errors
    assert errors["adapted"] < errors["raw last block"] + 1, errors
    assert chance > 4 * errors["adapted"], (chance, errors)
