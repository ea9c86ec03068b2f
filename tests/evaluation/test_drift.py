from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation.drift import (
    Correspondence,
    cycle_consistent,
    drift_by_gap,
    match_accuracy,
    mutual_correspondences,
    temporal_drift,
    tracking_error,
    true_correspondences,
)
from cosettle_adapter.video import RenderedClip, render_clip
from cosettle_adapter.video.geometry import plan_geometry

from helpers import noise

H, W, PATCH = 6, 8, 16
GEOMETRY = plan_geometry(H * PATCH, W * PATCH, patch=PATCH)
SMALL = plan_geometry(96, 128, patch=8)


def still(frames: int, noisy: float = 0.0) -> Tensor:
    """Distinct patches that stay where they are, with fresh noise in every frame."""
    return noise(1, 64, H, W) + noisy * noise(frames, 64, H, W, seed=1)


def in_place(frames: int) -> list[Correspondence]:
    patches = torch.arange(H * W)
    pairs = torch.stack([patches, patches], dim=1)
    return [Correspondence((t, t + 1), pairs) for t in range(frames - 1)]


def panning(frames: int) -> tuple[Tensor, RenderedClip]:
    """Patches that go one column to the left with every frame, and the clip they are of."""
    wide = noise(32, H, W + frames - 1)
    features = torch.stack([wide[:, :, t : t + W] for t in range(frames)])
    homographies = torch.eye(3, dtype=torch.float64).repeat(frames, 1, 1)
    homographies[:, 0, 2] = -PATCH * torch.arange(frames)
    pixels = torch.zeros(frames, 3, H * PATCH, W * PATCH, dtype=torch.uint8)
    return features, RenderedClip(pixels, homographies)


@pytest.mark.parametrize("noisy", [0.0, 0.5, 1.0])
def test_drift_is_the_share_of_variance_that_does_not_stay(noisy: float) -> None:
    # cosine of the same patch: 1 / (1 + n^2); of any two: about 0
    features = still(6, noisy)
    drift = temporal_drift(features, in_place(6))
    assert drift == pytest.approx(noisy**2 / (1 + noisy**2), abs=0.05)
    assert drift_by_gap(features, {1: in_place(6), 9: []}) == {"drift@1": drift}
    tokens = rearrange(features, "t c h w -> t (h w) c").double()
    tokens = torch.nn.functional.normalize(tokens - tokens.mean((0, 1)), dim=-1)
    same = (1 - (tokens[1:] * tokens[:-1]).sum(-1)).mean()
    any_two = torch.stack([1 - a @ b.T for a, b in itertools.pairwise(tokens)]).mean()
    assert drift == pytest.approx(float(same / any_two), rel=0.1, abs=1e-6), "its definition"


@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_drift_does_not_depend_on_scale_and_shift(scale: float, shift: float) -> None:
    features, pairs = still(3, 0.7), in_place(3)
    moved = temporal_drift(features * scale + shift, pairs)
    assert moved == pytest.approx(temporal_drift(features, pairs), rel=1e-3)


def test_noise_has_drift_one_and_where_there_is_nothing_to_measure_it_is_nan() -> None:
    assert temporal_drift(noise(4, 64, H, W), in_place(4)) == pytest.approx(1, abs=0.05)
    assert math.isnan(temporal_drift(torch.ones(4, 2, H, W), in_place(4)))
    assert math.isnan(temporal_drift(still(4), []))
    assert math.isnan(match_accuracy(still(4), []))


@pytest.mark.parametrize("gap", [1, 3])
def test_correspondences_of_a_pan(gap: int) -> None:
    features, clip = panning(5)
    pairs = true_correspondences(clip, GEOMETRY, gap)
    assert [found.frames for found in pairs] == [(t, t + gap) for t in range(5 - gap)]
    for true, matched in zip(pairs, mutual_correspondences(features, gap), strict=True):
        assert matched.frames == true.frames
        assert len(true.patches) == H * (W - gap), "columns that left the frame have none"
        assert (true.patches[:, 0] - true.patches[:, 1] == gap).all()
        known = {tuple(pair) for pair in true.patches.tolist()}
        assert known <= {tuple(pair) for pair in matched.patches.tolist()}
    assert temporal_drift(features, pairs) == 0
    assert match_accuracy(features, pairs) == 1
    assert mutual_correspondences(features, 5) == []


def test_hidden_patches_do_not_correspond_and_the_object_takes_its_own_along() -> None:
    photo, cutout = (255 * torch.rand(2, 3, 120, 160, generator=torch.manual_seed(0))).byte()
    clip = render_clip(photo, cutout=cutout, frames=6, size=(96, 128), amount=0.5, seed=2)
    assert clip.object_mask is not None
    rows, columns = SMALL.cell_centers().long().flip(-1).unbind(-1)
    on_object = clip.object_mask[:, rows, columns].flatten(1)
    (start, end), patches = true_correspondences(clip, SMALL, 4)[1]
    before, after = on_object[start][patches[:, 0]], on_object[end][patches[:, 1]]
    assert before.any()
    assert (before == after).float().mean() > 0.9, "all but those on the rim"
    # from frame 0 the clip's own tracks say which patches are visible near a centre
    positions, visible = clip.track(SMALL.cell_centers().flatten(0, 1))
    patches = SMALL.pixels_to_cells(positions[5])
    kept = visible[5] & ((patches - patches.round()).abs() <= 0.25).all(-1)
    rows, columns = patches.round().long().unbind(-1)
    kept &= (rows >= 0) & (columns >= 0) & (rows < 12) & (columns < 16)
    assert 0 < kept.sum() < visible[5].sum()
    found = true_correspondences(clip, SMALL, 5)[0].patches
    assert found[:, 0].tolist() == kept.nonzero()[:, 0].tolist()
    assert found[:, 1].tolist() == (rows * 16 + columns)[kept].tolist()


def test_patches_between_later_frames_follow_the_motion_between_them() -> None:
    photo = (255 * torch.rand(3, 120, 160, generator=torch.manual_seed(0))).byte()
    clip = render_clip(photo, frames=6, size=(96, 128), motion="mixed", amount=0.5, seed=2)
    centres = SMALL.cell_centers().flatten(0, 1).double()
    _, patches = true_correspondences(clip, SMALL, 4)[1]
    move = clip.homographies[5] @ torch.linalg.inv(clip.homographies[1])
    here = torch.cat([centres, torch.ones(len(centres), 1)], dim=1)[patches[:, 0]] @ move.T
    found = SMALL.pixels_to_cells(here[:, :2] / here[:, 2:])
    expected = SMALL.pixels_to_cells(centres[patches[:, 1]])
    assert len(patches) > 5
    assert float((found - expected).abs().max()) <= 0.2501


@pytest.mark.parametrize("off", [0, 1, 2])
def test_one_patch_off_is_near_enough(off: int) -> None:
    features = still(2)
    moved = torch.stack([features[0], features[0].roll((off, off), dims=(1, 2))])
    inner = torch.zeros(H, W, dtype=torch.bool)
    inner[: H - 2, : W - 2] = True
    pairs = [Correspondence((0, 1), in_place(2)[0].patches[inner.flatten()])]
    assert match_accuracy(moved, pairs) == (off < 2)


def cycle_by_hand(features: Tensor, gap: int) -> list[bool]:
    length, _, h, w = features.shape
    unit, home = torch.nn.functional.normalize(features, dim=1), []
    for t, i, j in itertools.product(range(length - gap), range(h), range(w)):
        there = (unit[t, :, i, j, None, None] * unit[t + gap]).sum(0).argmax().item()
        back = unit[t + gap, :, there // w, there % w, None, None]
        home.append((back * unit[t]).sum(0).argmax().item() == i * w + j)
    return home


@pytest.mark.parametrize("gap", [1, 2])
def test_cycles_equal_their_definition(gap: int) -> None:
    features = noise(4, 3, 4, 5)
    expected = cycle_by_hand(features, gap)
    found = cycle_consistent(7 * features, gap=gap)
    assert found.shape == (4 - gap, 4, 5)
    assert found.flatten().tolist() == expected
    assert 0.05 < sum(expected) / len(expected) < 0.95
    assert cycle_consistent(features, gap=gap).float().mean() == pytest.approx(
        sum(expected) / len(expected)
    )
    assert cycle_consistent(torch.ones(3, 4, 5, 5)).float().mean() == pytest.approx(1 / 25), (
        "by chance"
    )


def test_what_does_not_fit_is_described() -> None:
    with pytest.raises(GeometryError, match=r"\(4, 3, 3\).*expected floats of shape \(T, C, h, w"):
        cycle_consistent(torch.zeros(4, 3, 3))
    with pytest.raises(GeometryError, match=r"torch\.uint8"):
        cycle_consistent(torch.zeros(2, 4, 3, 3, dtype=torch.uint8))
    with pytest.raises(FrameError, match="got 1 frames, expected at least 2"):
        cycle_consistent(torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="gap=0"):
        cycle_consistent(noise(2, 4, 3, 3), gap=0)


def known_pan() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, points, positions and visibility of the pan."""
    features, clip = panning(4)
    points = rearrange(GEOMETRY.cell_centers()[:, 3:], "h w xy -> (h w) xy")
    positions, visible = clip.track(points)
    return features, points, positions, visible


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
    positions[0] += 50
    positions[2, :4] += 50
    visible[2, :4] = False
    figures = tracking_error(features, GEOMETRY, points, positions, visible, thresholds=(4,))
    assert figures["pck@4"] == 1.0
    assert figures["count"] == 3 * 30 - 4
    with pytest.raises(GeometryError, match=r"positions of shape \(3, 30, 2\)"):
        tracking_error(features, GEOMETRY, points, positions[:3], visible)
    with pytest.raises(FrameError, match="visible after frame 0"):
        tracking_error(features, GEOMETRY, points, positions, torch.zeros_like(visible))
