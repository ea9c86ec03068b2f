from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video import Geometry, plan_geometry
from cosettle_adapter.visualization import (
    similarity_frames,
    similarity_maps,
    similarity_peaks,
)

from helpers import noise


def moving(frames: int = 4) -> tuple[torch.Tensor, Geometry]:
    """Random features that move right by one cell a frame, of frames 60 x 90 at patch 10."""
    row = noise(16, 6, 9 + frames)
    clip = torch.stack([row[:, :, frames - t : frames - t + 9] for t in range(frames)])
    return clip, plan_geometry(60, 90, patch=10)


def grey_frames(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.full((frames, 3, height, width), 100, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_peak_goes_with_the_feature(dtype: torch.dtype) -> None:
    clip, geometry = moving()
    maps = similarity_maps(clip.to(dtype), geometry, (35, 25), frame=0)
    assert maps.dtype == torch.float32
    assert maps.shape == (4, 6, 9)
    expected = torch.tensor([[35.0 + 10 * t, 25.0] for t in range(4)], dtype=torch.float64)
    assert torch.equal(similarity_peaks(maps, geometry), expected)
    torch.testing.assert_close(maps.amax(dim=(1, 2)), torch.ones(4), atol=2e-3, rtol=0)


def test_maps_are_cosines_with_the_named_frame() -> None:
    clip, geometry = moving()
    maps = similarity_maps(clip, geometry, (85, 5), frame=2)
    unit = F.normalize(clip, dim=1)
    expected = (unit * rearrange(unit[2, :, 0, 8], "c -> c 1 1")).sum(dim=1)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    assert torch.equal(similarity_maps(clip, geometry, (85, 5), frame=-2), maps)


def test_between_two_cells_both_count() -> None:
    clip, geometry = moving(1)
    maps = similarity_maps(clip, geometry, (40, 25))
    assert maps[0, 2, 3] == pytest.approx(float(maps[0, 2, 4]), abs=1e-5)
    assert maps[0, 2, 3] > 0.5


def test_overlapping_patches_and_padding_are_where_the_geometry_says() -> None:
    geometry = plan_geometry(50, 70, patch=16, stride=8, fit="pad")
    clip = noise(2, 8, *geometry.grid)
    x, y = geometry.cell_centers()[2, 3].tolist()
    maps = similarity_maps(clip, geometry, (x, y))
    torch.testing.assert_close(similarity_peaks(maps, geometry)[0], geometry.cell_centers()[2, 3])
    assert similarity_frames(grey_frames(2, 50, 70), maps, geometry).shape == (2, 3, 50, 70)


def test_heat_is_brightest_at_the_peak_and_grey_where_nothing_is_alike() -> None:
    _, geometry = moving()
    maps = torch.full((9, 6, 9), -0.5)
    maps[:, 1, 7] = 1.0
    frames = grey_frames(9, 60, 90)
    frames[:, 0] += 80  # reddish
    heated = similarity_frames(frames, maps, geometry, mark_peaks=False)
    brightness = heated.float().mean(dim=1)
    assert (brightness[:, 15, 75] > brightness[:, 45, 20] + 50).all()
    assert heated[0, :, 45, 20].unique().numel() == 1
    assert torch.equal(heated[0], heated[8]), "chunks of frames are alike"
    marked = similarity_frames(frames, maps, geometry)
    ring = (marked != heated).any(dim=1)[0].nonzero().float()
    assert len(ring) > 10
    torch.testing.assert_close(ring.mean(dim=0) + 0.5, torch.tensor([15.0, 75.0]), atol=0.3, rtol=0)


def test_limits_stretch_the_colours() -> None:
    _, geometry = moving()
    frames, maps = grey_frames(1, 60, 90), torch.full((1, 6, 9), 0.25)
    narrow = similarity_frames(frames, maps, geometry, limits=(0, 0.25), mark_peaks=False)
    wide = similarity_frames(frames, 4 * maps, geometry, mark_peaks=False)
    assert torch.equal(narrow, wide)


def test_what_does_not_fit_is_told() -> None:
    clip, geometry = moving()
    frames = grey_frames(4, 60, 90)
    maps = similarity_maps(clip, geometry, (35, 25))
    with pytest.raises(FrameError, match="frame=4 of a clip of 4"):
        similarity_maps(clip, geometry, (35, 25), frame=4)
    for point, message in (((91, 25), r"\(91, 25\).*90 x 60"), ((float("nan"), 25), "nan")):
        with pytest.raises(GeometryError, match=message):
            similarity_maps(clip, geometry, point)
    with pytest.raises(ValueError, match=r"limits=\(1, 1\), expected a lower and a higher"):
        similarity_frames(frames, maps, geometry, limits=(1, 1))
    with pytest.raises(FrameError, match=r"expected \(4, h, w\)"):
        similarity_frames(frames, maps[:3], geometry)
    with pytest.raises(GeometryError, match=r"frames of \(30, 90\) pixels"):
        similarity_frames(frames[:, :, :30], maps, geometry)
