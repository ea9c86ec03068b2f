from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from cosettle_adapter.backbones.positions import resize_positions

MODES = ("size+antialias", "size", "scale+0.1")


def resize(positions: torch.Tensor, grid: tuple[int, int], mode: str, source: int, prefix: int = 1):  # type: ignore[no-untyped-def]
    return resize_positions(
        positions,
        grid,
        source_grid=(source, source),
        prefix=prefix,
        interpolation=mode,  # type: ignore[arg-type]
    )


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    mode=st.sampled_from(MODES),
    source=st.sampled_from([14, 16, 37]),
)
def test_every_grid_gets_exactly_its_positions(
    height: int, width: int, mode: str, source: int
) -> None:
    positions = torch.randn(1, 1 + source * source, 2)
    resized = resize(positions, (height, width), mode, source)
    assert resized.shape == (1, 1 + height * width, 2)
    assert torch.equal(resized[:, :1], positions[:, :1])
    assert bool(torch.isfinite(resized).all())


@pytest.mark.parametrize("mode", MODES)
def test_their_own_grid_is_left_alone(mode: str) -> None:
    positions = torch.randn(1, 1 + 37 * 37, 4)
    assert torch.equal(resize(positions, (37, 37), mode, 37), positions)


def test_size_with_antialias_is_what_timm_does() -> None:
    positions = torch.randn(1, 1 + 14 * 14, 8)
    expected = resample_abs_pos_embed(positions, new_size=[30, 55], num_prefix_tokens=1)
    torch.testing.assert_close(resize(positions, (30, 55), "size+antialias", 14), expected)


def test_scale_is_what_the_official_dino_code_does() -> None:
    positions = torch.randn(1, 1 + 14 * 14, 8)
    grid = (30, 55)
    cells = rearrange(positions[:, 1:], "1 (h w) c -> 1 c h w", h=14)
    cells = F.interpolate(
        cells, scale_factor=((grid[0] + 0.1) / 14, (grid[1] + 0.1) / 14), mode="bicubic"
    )
    expected = torch.cat([positions[:, :1], rearrange(cells, "1 c h w -> 1 (h w) c")], dim=1)
    torch.testing.assert_close(resize(positions, grid, "scale+0.1", 14), expected)


def test_half_precision_positions_are_resized_in_float32() -> None:
    positions = torch.randn(1, 14 * 14, 8)
    resized = resize(positions.half(), (20, 20), "size", 14, prefix=0)
    assert resized.dtype == torch.float32
