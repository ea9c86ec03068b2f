from __future__ import annotations

import pytest
import torch
from cosettle_adapter.evaluation.consistency import (
    cycle_accuracy,
    cycle_consistent,
    tracking_error,
)
from einops import rearrange
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.variants import compare_features
from cosettle_adapter.video import photographs, render_clip
from cosettle_adapter.video.geometry import plan_geometry


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cycle_by_hand(features: Tensor, gap: int, tolerance: int) -> list[bool]:
    length, _, h, w = features.shape
    unit = torch.nn.functional.normalize(features, dim=1)
    home = []
    for t in range(length - gap):
        for i in range(h):
            for j in range(w):
                there = (unit[t, :, i, j, None, None] * unit[t + gap]).sum(0).argmax().item()
                back = unit[t + gap, :, there // w, there % w, None, None]
                again = (back * unit[t]).sum(0).argmax().item()
                home.append(max(abs(again // w - i), abs(again % w - j)) <= tolerance)
    return home


@pytest.mark.parametrize(("gap", "tolerance"), [(1, 0), (1, 1), (2, 0)])
def test_cycles_equal_their_definition(gap: int, tolerance: int) -> None:
    features = noise(4, 3, 4, 5)
    expected = cycle_by_hand(features, gap, tolerance)
    assert 0.05 < sum(expected) / len(expected) < 0.95
    found = cycle_consistent(7 * features, gap=gap, tolerance=tolerance)
    assert found.flatten().tolist() == expected
    assert found.shape == (4 - gap, 4, 5)
    accuracy = cycle_accuracy(features, gap=gap, tolerance=tolerance)
    assert accuracy == pytest.approx(sum(expected) / len(expected))


def test_still_frames_come_home_and_constant_features_by_chance() -> None:
    assert cycle_accuracy(noise(1, 16, 4, 6).expand(3, -1, -1, -1)) == 1.0
    assert cycle_accuracy(torch.ones(3, 4, 5, 5)) == pytest.approx(1 / 25)


def test_features_that_do_not_fit_are_described() -> None:
    with pytest.raises(GeometryError, match=r"\(4, 3, 3\).*expected floats of shape \(T, C, h, w"):
        cycle_accuracy(torch.zeros(4, 3, 3))
    with pytest.raises(GeometryError, match=r"torch\.uint8"):
        cycle_accuracy(torch.zeros(2, 4, 3, 3, dtype=torch.uint8))
    with pytest.raises(FrameError, match="got 1 frames, expected at least 2"):
        cycle_accuracy(torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="gap=0"):
        cycle_accuracy(noise(2, 4, 3, 3), gap=0)


def known_pan() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, points, positions and visibility of a pan by one patch of 16 pixels a frame."""
    wide = noise(32, 6, 11)
    features = torch.stack([wide[:, :, t : t + 8] for t in range(4)])
    columns, rows = torch.meshgrid(torch.arange(3, 8), torch.arange(6), indexing="xy")
    points = torch.stack([columns.flatten(), rows.flatten()], dim=-1) * 16.0 + 8
    shift = torch.stack([-16.0 * torch.arange(4), torch.zeros(4)], dim=-1)
    positions = points + rearrange(shift, "t xy -> t 1 xy")
    return features, points, positions, torch.ones(positions.shape[:2], dtype=torch.bool)


def test_tracking_error_is_in_pixels_of_the_frame_not_of_the_resized_one() -> None:
    features, points, positions, visible = known_pan()
    wrong = positions.clone()
    wrong[1:, :, 1] += 7.0  # the truth lies 7 px, at full size 14, from where it is found
    for size, scale in (((96, 128), 1), ((192, 256), 2)):
        geometry = plan_geometry(*size, patch=16, size=(96, 128))
        exact = tracking_error(features, geometry, points * scale, positions * scale, visible)
        assert exact["mean"] < 0.1 * scale
        assert exact["pck@4"] == exact["pck@16"] == 1.0
        off = tracking_error(
            features, geometry, points * scale, wrong * scale, visible, thresholds=(8, 15)
        )
        assert off["median"] == pytest.approx(7 * scale, abs=0.1)
        assert (off["pck@8"], off["pck@15"]) == (2 - scale, 1.0)


def test_hidden_points_and_the_first_frame_do_not_count() -> None:
    features, points, positions, visible = known_pan()
    geometry = plan_geometry(96, 128, patch=16)
    positions[0] += 50
    positions[2, :4] += 50
    visible[2, :4] = False
    figures = tracking_error(features, geometry, points, positions, visible, thresholds=(4,))
    assert figures["pck@4"] == 1.0
    assert figures["count"] == 3 * 30 - 4
    with pytest.raises(GeometryError, match=r"positions of shape \(3, 30, 2\)"):
        tracking_error(features, geometry, points, positions[:3], visible)
    with pytest.raises(FrameError, match="visible after frame 0"):
        tracking_error(features, geometry, points, positions, torch.zeros_like(visible))


@pytest.mark.parametrize("motion", ["pan", "rotate"])
def test_points_of_a_photograph_are_followed_to_a_few_pixels(
    motion: str, real_adapter: CoSettleAdapter
) -> None:
    photo, size = photographs()["astronaut"], (196, 280)
    clip = render_clip(photo, frames=5, size=size, motion=motion, amount=0.25, seed=0)
    geometry = real_adapter.geometry(*size)
    points = rearrange(geometry.cell_centers()[3:-3, 3:-3], "h w xy -> (h w) xy")
    positions, visible = clip.track(points)
    assert float((positions[-1] - positions[0]).norm(dim=-1).median()) > 8
    errors = {
        name: tracking_error(features, geometry, points, positions, visible)["median"]
        for name, features in compare_features(real_adapter, clip.frames).items()
    }
    chance = tracking_error(noise(5, 8, *geometry.grid), geometry, points, positions, visible)
    assert errors["adapted"] < min(real_adapter.backbone.patch, errors["raw last layer"] + 1)
    assert chance["median"] > 4 * errors["adapted"]
