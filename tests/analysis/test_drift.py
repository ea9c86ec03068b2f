from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cosettle_adapter.analysis import (
    Correspondence,
    match_accuracy,
    mutual_correspondences,
    temporal_drift,
    true_correspondences,
)
from cosettle_adapter.analysis.drift import guide_layer
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video.geometry import plan_geometry
from cosettle_adapter.video.rendered import RenderedClip, render_clip

H, W, CELL = 6, 8, 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def still(frames: int, noisy: float = 0.0) -> Tensor:
    """Distinct patches that stay where they are, with fresh noise in every frame."""
    return noise(1, 64, H, W) + noisy * noise(frames, 64, H, W, seed=1)


def in_place(frames: int, gap: int = 1) -> list[Correspondence]:
    patches = torch.arange(H * W)
    pairs = torch.stack([patches, patches], dim=1)
    return [Correspondence((t, t + gap), pairs) for t in range(frames - gap)]


def panning(frames: int, *, step: int = 1) -> tuple[Tensor, RenderedClip]:
    """Patches that go ``step`` columns to the left with every frame, and the clip they are of."""
    wide = noise(32, H, W + step * (frames - 1))
    features = torch.stack([wide[:, :, step * t : step * t + W] for t in range(frames)])
    homographies = torch.eye(3, dtype=torch.float64).repeat(frames, 1, 1)
    homographies[:, 0, 2] = -step * CELL * torch.arange(frames)
    pixels = torch.zeros(frames, 3, H * CELL, W * CELL, dtype=torch.uint8)
    return features, RenderedClip(pixels, homographies)


@pytest.mark.parametrize("noisy", [0.0, 0.5, 1.0])
def test_drift_is_the_share_of_variance_that_does_not_stay(noisy: float) -> None:
    # cosine of the same patch: 1 / (1 + n^2); of any two: about 0
    drift = temporal_drift(still(6, noisy), in_place(6))
    assert drift == pytest.approx(noisy**2 / (1 + noisy**2), abs=0.05)


def test_drift_equals_its_definition() -> None:
    features = still(3, 0.7)
    tokens = rearrange(features, "t c h w -> t (h w) c").double()
    tokens = torch.nn.functional.normalize(tokens - tokens.mean((0, 1)), dim=-1)
    same = (1 - (tokens[1:] * tokens[:-1]).sum(-1)).mean()
    any_two = torch.stack([1 - a @ b.T for a, b in itertools.pairwise(tokens)]).mean()
    assert temporal_drift(features, in_place(3)) == pytest.approx(float(same / any_two), rel=0.1)


@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_drift_knows_neither_scale_nor_shift(scale: float, shift: float) -> None:
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
def test_true_correspondences_of_a_pan(gap: int) -> None:
    features, clip = panning(5)
    pairs = true_correspondences(clip, plan_geometry(H * CELL, W * CELL, patch=CELL), gap)
    assert [found.frames for found in pairs] == [(t, t + gap) for t in range(5 - gap)]
    for _, patches in pairs:
        assert len(patches) == H * (W - gap), "columns that left the frame have none"
        assert (patches[:, 0] - patches[:, 1] == gap).all()
    assert temporal_drift(features, pairs) == 0
    assert match_accuracy(features, pairs) == 1
    assert mutual_correspondences(features, 5) == []


def test_hidden_patches_do_not_correspond_and_the_object_takes_its_own_along() -> None:
    photo, cutout = (torch.randint(0, 256, (3, 120, 160), dtype=torch.uint8) for _ in range(2))
    clip = render_clip(photo, cutout=cutout, frames=6, size=(96, 128), amount=0.5, seed=2)
    assert clip.object_mask is not None
    geometry = plan_geometry(96, 128, patch=8)
    rows, columns = geometry.cell_centers().long().flip(-1).unbind(-1)
    on_object = clip.object_mask[:, rows, columns].flatten(1)
    (start, end), patches = true_correspondences(clip, geometry, 4)[1]
    before, after = on_object[start][patches[:, 0]], on_object[end][patches[:, 1]]
    assert before.any()
    assert (before == after).float().mean() > 0.9, "all but those on the rim"
    positions, visible = clip.track(geometry.cell_centers().flatten(0, 1))
    (_, end), first = true_correspondences(clip, geometry, 5)[0]
    cells = geometry.pixels_to_cells(positions[end])
    rows, columns = cells.round().long().unbind(-1)
    grid = geometry.grid
    kept = visible[end] & ((cells - cells.round()).abs() <= 0.25).all(-1)
    kept &= (rows >= 0) & (columns >= 0) & (rows < grid[0]) & (columns < grid[1])
    assert 0 < kept.sum() < visible[end].sum()
    assert first[:, 0].tolist() == kept.nonzero()[:, 0].tolist()
    assert first[:, 1].tolist() == (rows * grid[1] + columns)[kept].tolist()


def test_mutual_correspondences_are_the_motion_where_patches_are_distinct() -> None:
    features, clip = panning(4)
    geometry = plan_geometry(H * CELL, W * CELL, patch=CELL)
    for mine, true in zip(
        mutual_correspondences(features, 1), true_correspondences(clip, geometry, 1), strict=True
    ):
        assert mine.frames == true.frames
        known = {tuple(pair) for pair in true.patches.tolist()}
        assert known <= {tuple(pair) for pair in mine.patches.tolist()}


def test_blurring_lowers_drift_and_match_accuracy_shows_it() -> None:
    features, pairs = still(4, 1.0), in_place(4)
    blurred = torch.nn.functional.avg_pool2d(features, 5, 1, 2, count_include_pad=False)
    constant = features.mean((2, 3), keepdim=True).expand_as(features)
    assert match_accuracy(features, pairs) > match_accuracy(blurred, pairs)
    assert match_accuracy(constant, pairs) < 0.2
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


@pytest.mark.parametrize(
    ("depth", "read", "layer"),
    [
        (12, {7, 11}, 8),
        (12, {7, 8}, 6),
        (12, set(), 7),
        (24, {11}, 15),
        (6, {3, 4, 5}, 2),
        (1, {0}, 0),
    ],
)
def test_the_layer_that_judges_is_read_by_nothing_else(
    depth: int, read: set[int], layer: int
) -> None:
    assert guide_layer(depth, read) == layer
