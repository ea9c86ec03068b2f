"""DINO-Tracker's grid and file, held against its documented interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dino_tracker_interface import (
    best_buddies,
    coordinates,
    flat,
    make_clip,
    refined,
    small_adapter,
    with_dot,
)
from einops import rearrange
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import extract
from cosettle_adapter.extraction.dino_tracker import arrange, cells
from cosettle_adapter.extraction.settings import DinoTrackerError, FormatError

GRIDS = {7: (67, 121), 14: (34, 61)}


def tracker_features(adapter: CoSettleAdapter, frames: list[Tensor], stride: int) -> Tensor:
    """What its file holds of frames of 476 x 854."""
    frame = torch.stack(frames)
    geometry = adapter.geometry(*frame.shape[-2:])
    return arrange(adapter(frame, batch_size=1), geometry, stride=stride)


@pytest.mark.parametrize("stride", GRIDS)
def test_patches_lie_where_its_best_buddies_expect_them(stride: int) -> None:
    assert cells(stride).grid == GRIDS[stride]
    centres = rearrange(cells(stride).cell_centers(), "h w xy -> (h w) xy")
    torch.testing.assert_close(centres.float(), coordinates(stride), rtol=0, atol=0)
    with pytest.raises(DinoTrackerError, match="stride must be 7 or 14, got 8"):
        cells(8)


@pytest.mark.parametrize(("patch", "stride"), [(14, 7), (14, 14), (16, 7), (16, 14)])
def test_a_dot_is_seen_in_the_patch_that_it_is_in(patch: int, stride: int) -> None:
    adapter = small_adapter(patch, stride)
    h, w = GRIDS[stride]
    dots = [(0, 0), (h - 1, w - 1), (h // 2, w // 3)]
    frames = [flat(), *(with_dot(7 + stride * col, 7 + stride * row) for row, col in dots)]
    blank, *dotted = tracker_features(adapter, frames, stride)
    for (row, col), features in zip(dots, dotted, strict=True):
        assert features.shape == (1024, h, w)
        assert features.dtype == torch.float32
        difference = (features - blank).norm(dim=0)
        assert divmod(int(difference.argmax()), w) == (row, col)


@pytest.mark.parametrize(("patch", "stride"), [(16, 14), (14, 14), (8, None)])
def test_a_dot_between_patches_is_seen_between_them(patch: int, stride: int | None) -> None:
    """To a pixel or two: centres of another grid's patches would be up to 8 off."""
    x, y = 431, 236
    frames = [flat(), with_dot(x, y, side=28)]
    blank, dotted = tracker_features(small_adapter(patch, stride), frames, 14)
    difference = (dotted - blank).norm(dim=0).flatten().double()
    weight = (difference - difference.quantile(0.98)).clamp(min=0)  # the rest is attention
    centre = (weight[:, None] * coordinates(14)).sum(dim=0) / weight.sum()
    assert (centre - torch.tensor([x, y])).abs().max() < 2.5


def test_patch_14_is_left_as_the_backbone_gives_it() -> None:
    frame = torch.randint(0, 256, (3, 476, 854), dtype=torch.uint8)
    for stride in GRIDS:
        adapter = small_adapter(14, stride)
        (features,) = tracker_features(adapter, [frame], stride)
        torch.testing.assert_close(features[:48], adapter(frame), rtol=0, atol=0)
        assert not features[48:].any()


def test_frames_of_another_size_are_mapped_onto_the_same_patches() -> None:
    geometry = small_adapter(14, 14).geometry(238, 427, size=(476, 854))
    grid = torch.randn(2, 48, 34, 61)
    torch.testing.assert_close(arrange(grid, geometry, stride=14)[:, :48], grid, rtol=0, atol=0)
    enlarged = arrange(grid, geometry, stride=7)
    torch.testing.assert_close(enlarged[:, :48, ::2, ::2], grid, rtol=0, atol=1e-5)
    for value, what in ((0.0, "zero"), (float("nan"), "not finite")):  # its losses would break
        grid[1, :, 3, 4] = value
        with pytest.raises(DinoTrackerError, match=f"frame 6 at row 3, column 4 is {what}"):
            arrange(grid, geometry, stride=14, first=5)


def test_best_buddies_follow_a_shift_and_the_residual_fits() -> None:
    wide = torch.randint(0, 256, (3, 34, 70), generator=torch.Generator().manual_seed(0))
    wide = wide.repeat_interleave(14, dim=1).repeat_interleave(14, dim=2).to(torch.uint8)
    frames = [wide[:, :, left : left + 854] for left in (28, 0)]
    features = tracker_features(small_adapter(14, 14), frames, 14)
    source, target = best_buddies(features, 0, 1, stride=14)
    assert len(source) > 1000
    moved = (target - source == torch.tensor([28.0, 0.0])).all(dim=1)
    assert moved.float().mean() > 0.95
    torch.testing.assert_close(refined(features, 14), features)


def test_the_format_writes_what_the_tracker_reads_and_resumes(tmp_path: Path) -> None:
    def stop(frames: int) -> None:
        if frames >= 4:
            raise KeyboardInterrupt

    adapter = small_adapter(14)
    frames = [with_dot(100 + 14 * t, 90) for t in range(5)]
    video = make_clip(tmp_path, frames) / "video"
    whole = extract(adapter, video, tmp_path / "whole.pt", batch_size=2)
    assert (whole.frames, whole.shape) == (5, (1024, 34, 61))
    features = torch.load(whole.path, map_location="cpu", weights_only=True)
    expected = tracker_features(adapter, frames, 14)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    with pytest.raises(KeyboardInterrupt):
        extract(adapter, video, tmp_path / "broken.pt", batch_size=2, on_chunk=stop)
    resumed = extract(adapter, video, tmp_path / "broken.pt", batch_size=2)
    assert resumed.found > 0
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    small = [torch.randint(0, 256, (3, 120, 200), dtype=torch.uint8)]
    result = extract(small_adapter(16, 7), iter(small), tmp_path / "f.pt")
    assert result.shape == (1024, *GRIDS[7])


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    adapter, frames, output = small_adapter(14), [flat()], tmp_path / "f.pt"
    with pytest.raises(FormatError, match="leave --size and --fit out"):
        extract(adapter, frames, output, size=224)
    with pytest.raises(FormatError, match="float32"):
        extract(adapter, frames, output, storage=torch.float16)
    with pytest.raises(DinoTrackerError, match=r"small-vit14 has 1040 channels.*at most 1024"):
        extract(small_adapter(14, width=1040), frames, output)
    with pytest.raises(FrameError):
        extract(adapter, tmp_path / "nowhere", output)
    assert not output.exists()


def test_the_real_backbone_sees_a_dot(real_adapter: CoSettleAdapter) -> None:
    row, col = 12, 40
    frames = [flat(), with_dot(7 + 14 * col, 7 + 14 * row)]
    blank, dotted = tracker_features(real_adapter, frames, 14)
    assert divmod(int((dotted - blank).norm(dim=0).argmax()), 61) == (row, col)
    assert float(dotted.norm(dim=0).mean()) > 5
