from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.evaluation.drift import (
    Correspondence,
    drift_by_gap,
    match_accuracy,
    mutual_correspondences,
    temporal_drift,
    true_correspondences,
)
from cosettle_adapter.video import RenderedClip, render_clip
from cosettle_adapter.video.geometry import plan_geometry

H, W, PATCH = 6, 8, 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    drift = temporal_drift(still(6, noisy), in_place(6))
    assert drift == pytest.approx(noisy**2 / (1 + noisy**2), abs=0.05)
    assert drift_by_gap(still(6, noisy), {1: in_place(6), 9: []}) == {"drift@1": drift}


def test_drift_equals_its_definition() -> None:
    features = still(3, 0.7)
    tokens = rearrange(features, "t c h w -> t (h w) c").double()
    tokens = torch.nn.functional.normalize(tokens - tokens.mean((0, 1)), dim=-1)
    same = (1 - (tokens[1:] * tokens[:-1]).sum(-1)).mean()
    any_two = torch.stack([1 - a @ b.T for a, b in itertools.pairwise(tokens)]).mean()
    assert temporal_drift(features, in_place(3)) == pytest.approx(float(same / any_two), rel=0.1)


@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_drift_does_not_depend_on_scale_and_shift(scale: float, shift: float) -> None:
    features, pairs = still(3, 0.7), in_place(3)
    moved = temporal_drift(features * scale + shift, pairs)
    assert moved == pytest.approx(temporal_drift(features, pairs), rel=1e-3)


def test_noise_has_drift_one_and_features_all_equal_have_none() -> None:
    assert temporal_drift(noise(4, 64, H, W), in_place(4)) == pytest.approx(1, abs=0.05)
    assert math.isnan(temporal_drift(torch.ones(4, 2, H, W), in_place(4)))
    assert math.isnan(temporal_drift(still(4), []))
    with pytest.raises(GeometryError, match="expected floats of shape"):
        temporal_drift(torch.ones(2, H, W), in_place(2))


@pytest.mark.parametrize("gap", [1, 3])
def test_correspondences_of_a_pan(gap: int) -> None:
    features, clip = panning(5)
    pairs = true_correspondences(clip, plan_geometry(H * PATCH, W * PATCH, patch=PATCH), gap)
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
    generator = torch.Generator().manual_seed(0)
    photo, cutout = torch.randint(0, 256, (2, 3, 120, 160), dtype=torch.uint8, generator=generator)
    clip = render_clip(photo, cutout=cutout, frames=6, size=(96, 128), amount=0.5, seed=2)
    assert clip.object_mask is not None
    geometry = plan_geometry(96, 128, patch=8)
    rows, columns = geometry.cell_centers().long().flip(-1).unbind(-1)
    on_object = clip.object_mask[:, rows, columns].flatten(1)
    (start, end), patches = true_correspondences(clip, geometry, 4)[1]
    before, after = on_object[start][patches[:, 0]], on_object[end][patches[:, 1]]
    assert before.any()
    assert (before == after).float().mean() > 0.9, "all but those on the rim"
    # from frame 0 the clip's own tracks say which patches are visible near a centre
    positions, visible = clip.track(geometry.cell_centers().flatten(0, 1))
    patches = geometry.pixels_to_cells(positions[5])
    kept = visible[5] & ((patches - patches.round()).abs() <= 0.25).all(-1)
    rows, columns = patches.round().long().unbind(-1)
    kept &= (rows >= 0) & (columns >= 0) & (rows < 12) & (columns < 16)
    assert 0 < kept.sum() < visible[5].sum()
    found = true_correspondences(clip, geometry, 5)[0].patches
    assert found[:, 0].tolist() == kept.nonzero()[:, 0].tolist()
    assert found[:, 1].tolist() == (rows * 16 + columns)[kept].tolist()


def test_patches_between_later_frames_follow_the_motion_between_them() -> None:
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (3, 120, 160), dtype=torch.uint8, generator=generator)
    clip = render_clip(photo, frames=6, size=(96, 128), motion="mixed", amount=0.5, seed=2)
    geometry = plan_geometry(96, 128, patch=8)
    centres = geometry.cell_centers().flatten(0, 1).double()
    _, patches = true_correspondences(clip, geometry, 4)[1]
    move = clip.homographies[5] @ torch.linalg.inv(clip.homographies[1])
    here = torch.cat([centres, torch.ones(len(centres), 1)], dim=1)[patches[:, 0]] @ move.T
    found = geometry.pixels_to_cells(here[:, :2] / here[:, 2:])
    expected = geometry.pixels_to_cells(centres[patches[:, 1]])
    assert len(patches) > 5
    assert float((found - expected).abs().max()) <= 0.2501


def test_blurring_lowers_match_accuracy() -> None:
    features, pairs = still(4, 1.0), in_place(4)
    blurred = torch.nn.functional.avg_pool2d(features, 5, 1, 2, count_include_pad=False)
    assert match_accuracy(features, pairs) > match_accuracy(blurred, pairs)
    assert math.isnan(match_accuracy(features, []))


@pytest.mark.parametrize("off", [0, 1, 2])
def test_one_patch_off_is_near_enough(off: int) -> None:
    features = still(2)
    moved = features.clone()
    moved[1] = features[1].roll((off, off), dims=(1, 2))
    inner = torch.zeros(H, W, dtype=torch.bool)
    inner[: H - 2, : W - 2] = True
    pairs = [Correspondence((0, 1), in_place(2)[0].patches[inner.flatten()])]
    assert match_accuracy(moved, pairs) == (off < 2)
