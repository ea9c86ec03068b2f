from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter import CoSettleAdapter, analysis
from cosettle_adapter.analysis import (
    compare_features,
    cycle_accuracy,
    tracking_error,
)
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video.geometry import plan_geometry

from helpers import projection_for

if TYPE_CHECKING:
    from cosettle_adapter.backbones import VisionTransformerBackbone


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def panning(frames: int, h: int, w: int, *, step: int = 1) -> torch.Tensor:
    """Distinct cells that move ``step`` columns to the left with every frame."""
    wide = noise(32, h, w + step * (frames - 1))
    return torch.stack([wide[:, :, step * t : step * t + w] for t in range(frames)])


def cycle_by_hand(features: torch.Tensor, gap: int, tolerance: int) -> float:
    length, _, h, w = features.shape
    unit = torch.nn.functional.normalize(features, dim=1)
    home, cells = 0, 0
    for t in range(length - gap):
        for i in range(h):
            for j in range(w):
                there = (unit[t, :, i, j, None, None] * unit[t + gap]).sum(0).argmax().item()
                back = unit[t + gap, :, there // w, there % w, None, None]
                again = (back * unit[t]).sum(0).argmax().item()
                off = max(abs(again // w - i), abs(again % w - j))
                home += off <= tolerance
                cells += 1
    return home / cells


@pytest.mark.parametrize(("gap", "tolerance"), [(1, 0), (1, 1), (2, 0)])
def test_cycle_accuracy_equals_its_definition(gap: int, tolerance: int) -> None:
    features = noise(4, 3, 4, 5)
    expected = cycle_by_hand(features, gap, tolerance)
    assert 0.05 < expected < 0.95
    got = cycle_accuracy(features, gap=gap, tolerance=tolerance)
    assert got == pytest.approx(expected)


def test_cells_of_a_frame_that_stands_still_all_come_home() -> None:
    assert cycle_accuracy(noise(1, 16, 4, 6).expand(3, -1, -1, -1)) == 1.0


def test_features_that_do_not_vary_come_home_by_chance() -> None:
    assert cycle_accuracy(torch.ones(3, 4, 5, 5)) == pytest.approx(1 / 25)


@given(scale=st.floats(1e-2, 1e2), chunk=st.integers(1, 30))
def test_cycle_accuracy_knows_neither_scale_nor_chunk(scale: float, chunk: int) -> None:
    features = noise(3, 4, 4, 5)
    assert cycle_accuracy(features * scale, chunk=chunk) == cycle_accuracy(features)


def test_shapes_and_lengths_are_checked() -> None:
    with pytest.raises(GeometryError, match=r"\(4, 3, 3\).*expected floats of shape \(T, C, h, w"):
        cycle_accuracy(torch.zeros(4, 3, 3))
    with pytest.raises(GeometryError, match=r"torch\.uint8"):
        cycle_accuracy(torch.zeros(2, 4, 3, 3, dtype=torch.uint8))
    with pytest.raises(FrameError, match="got 1 frames, expected at least 2"):
        cycle_accuracy(torch.zeros(1, 4, 3, 3))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="gap=0"):
        cycle_accuracy(noise(2, 4, 3, 3), gap=0)


def known_pan() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, points, positions and visibility of a pan by one cell of 16 pixels a frame."""
    features = panning(4, 6, 8)
    columns, rows = torch.meshgrid(torch.arange(3, 8), torch.arange(6), indexing="xy")
    points = torch.stack([columns.flatten(), rows.flatten()], dim=-1) * 16.0 + 8
    shift = torch.stack([-16.0 * torch.arange(4), torch.zeros(4)], dim=-1)
    positions = points + rearrange(shift, "t xy -> t 1 xy")
    return features, points, positions, torch.ones(positions.shape[:2], dtype=torch.bool)


def test_tracking_finds_a_known_motion() -> None:
    features, points, positions, visible = known_pan()
    geometry = plan_geometry(96, 128, patch=16)
    figures = tracking_error(features, geometry, points, positions, visible)
    assert figures["mean"] < 0.1
    assert figures["pck@4"] == figures["pck@16"] == 1.0
    assert figures["count"] == 3 * 30


def test_tracking_error_is_in_pixels_of_the_frame_not_of_the_resized_one() -> None:
    features, points, positions, visible = known_pan()
    positions = positions.clone()
    positions[1:, :, 1] += 7.0  # the truth lies 7 px, at full size 14, from where it is found
    for size, scale in (((96, 128), 1), ((192, 256), 2)):
        geometry = plan_geometry(*size, patch=16, size=(96, 128))
        figures = tracking_error(
            features, geometry, points * scale, positions * scale, visible, thresholds=(8, 15)
        )
        assert figures["median"] == pytest.approx(7 * scale, abs=0.1)
        assert figures["pck@8"] == (1.0 if scale == 1 else 0.0)
        assert figures["pck@15"] == 1.0


def test_hidden_points_and_the_first_frame_do_not_count() -> None:
    features, points, positions, visible = known_pan()
    positions, visible = positions.clone(), visible.clone()
    positions[0] += 50  # never looked at
    positions[2, :4] += 50
    visible[2, :4] = False
    figures = tracking_error(
        features, plan_geometry(96, 128, patch=16), points, positions, visible, thresholds=(4,)
    )
    assert figures["pck@4"] == 1.0
    assert figures["count"] == 3 * 30 - 4


def test_tracking_error_says_what_does_not_fit() -> None:
    features, points, positions, visible = known_pan()
    geometry = plan_geometry(96, 128, patch=16)
    with pytest.raises(GeometryError, match=r"positions of shape \(3, 30, 2\)"):
        tracking_error(features, geometry, points, positions[:3], visible)
    with pytest.raises(FrameError, match="visible after frame 0"):
        tracking_error(features, geometry, points, positions, torch.zeros_like(visible))


def frames_of(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (length, 3, 32, 48), dtype=torch.uint8, generator=generator)


def test_compare_features_gives_what_the_parts_give(tiny_adapter: CoSettleAdapter) -> None:
    frames, done = frames_of(5), []
    variants = compare_features(tiny_adapter, frames, batch_size=2, on_frames=done.append)
    assert list(variants) == [
        analysis.RAW_LAST,
        analysis.RAW_SAME,
        analysis.CENTRED,
        analysis.ADAPTED,
    ]
    assert done == [2, 4, 5]
    raw, adapted = tiny_adapter(frames, return_backbone=True)
    torch.testing.assert_close(variants[analysis.RAW_SAME], raw)
    torch.testing.assert_close(variants[analysis.ADAPTED], adapted)
    last = tiny_adapter.backbone.patch_tokens(tiny_adapter.preprocess(frames))
    torch.testing.assert_close(variants[analysis.RAW_LAST], last)
    mean = variants[analysis.CENTRED].mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)


def test_compare_features_fuses_what_is_to_be_fused(tiny_adapter: CoSettleAdapter) -> None:
    frames = frames_of(5)
    kinds = analysis.feature_kinds(tiny_adapter, fusion="symmetric")
    fused = compare_features(tiny_adapter, frames, batch_size=2, kinds=kinds)["adapted, fused"]
    streamed = tiny_adapter.stream(frames, temporal_fusion="symmetric")
    torch.testing.assert_close(fused, torch.cat([chunk.features for chunk in streamed]))


def test_a_projection_on_the_last_block_leaves_out_the_doubled_row(
    tiny_backbone: VisionTransformerBackbone,
) -> None:
    projection = projection_for(tiny_backbone, layers=(11,), norm=tiny_backbone.row.final_norm)
    variants = compare_features(CoSettleAdapter(tiny_backbone, projection), frames_of(2))
    assert list(variants) == [analysis.RAW_LAST, analysis.CENTRED, analysis.ADAPTED]


@pytest.mark.parametrize(
    ("layers", "norm"), [((3,), False), ((3,), True), ((11,), False), ((3, 11), False)]
)
def test_compare_features_reads_what_the_config_says(
    tiny_backbone: VisionTransformerBackbone, layers: tuple[int, ...], norm: bool
) -> None:
    projection = projection_for(
        tiny_backbone, layers=layers, norm=norm, in_width=tiny_backbone.width * len(layers)
    )
    adapter, frames = CoSettleAdapter(tiny_backbone, projection), frames_of(1)
    variants = compare_features(adapter, frames)
    torch.testing.assert_close(variants[analysis.ADAPTED], adapter(frames))
    last = adapter.backbone.patch_tokens(adapter.preprocess(frames))
    torch.testing.assert_close(variants[analysis.RAW_LAST], last)


def test_the_map_of_cells_that_come_home_has_the_accuracy_as_its_mean() -> None:
    features = noise(4, 3, 4, 5)
    home = analysis.comes_home(features, gap=2)
    assert home.shape == (2, 4, 5)
    assert home.dtype == torch.bool
    assert float(home.float().mean()) == pytest.approx(cycle_accuracy(features, gap=2))
    # a cell that is replaced by noise is lost, and only it
    still = noise(1, 16, 4, 5).expand(2, -1, -1, -1).clone()
    still[1, :, 2, 3] = noise(16, seed=1)
    lost = (~analysis.comes_home(still)[0]).nonzero().tolist()
    assert [2, 3] in lost
