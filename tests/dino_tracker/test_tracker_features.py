from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cosettle_adapter.dino_tracker.frames import image_files, read_frame
from dino_tracker_interface import best_buddies, coordinates, flat, refined, small_adapter, with_dot
from einops import rearrange
from PIL import Image
from torchvision import transforms

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.correspondence import temporal_fusion
from cosettle_adapter.dino_tracker import (
    DinoTrackerError,
    arrange,
    cells,
    load_overlapping,
    tracker_features,
)
from cosettle_adapter.errors import FrameError, GeometryError

GRIDS = {7: (67, 121), 14: (34, 61)}


@pytest.mark.parametrize("stride", GRIDS)
def test_cells_lie_where_its_best_buddies_expect_them(stride: int) -> None:
    assert cells(stride).grid == GRIDS[stride]
    centres = rearrange(cells(stride).cell_centers(), "h w xy -> (h w) xy")
    torch.testing.assert_close(centres.float(), coordinates(stride), rtol=0, atol=0)


def test_other_strides_do_not_exist() -> None:
    with pytest.raises(DinoTrackerError, match="stride must be 7 or 14, got 8"):
        cells(8)


@pytest.mark.parametrize("stride", GRIDS)
@pytest.mark.parametrize("patch", [14, 16])
def test_a_dot_is_seen_in_the_cell_that_it_is_in(patch: int, stride: int) -> None:
    adapter = small_adapter(patch, stride)
    h, w = GRIDS[stride]
    dots = [(0, 0), (h - 1, w - 1), (h // 2, w // 3)]
    frames = [flat(), *(with_dot(7 + stride * col, 7 + stride * row) for row, col in dots)]
    blank, *dotted = tracker_features(adapter, frames, stride=stride, batch_size=1)
    for (row, col), features in zip(dots, dotted, strict=True):
        assert features.shape == (1, 1024, h, w)
        assert features.dtype == torch.float32
        assert features.is_contiguous()
        difference = (features - blank).norm(dim=1)[0]
        assert divmod(int(difference.argmax()), w) == (row, col)


@pytest.mark.parametrize(("patch", "stride"), [(16, 14), (14, 14), (16, None), (8, None)])
def test_a_dot_between_cells_is_seen_between_them(patch: int, stride: int | None) -> None:
    """To a pixel or two: centres of another grid's cells would be up to 8 off."""
    adapter = small_adapter(patch, stride)
    x, y = 431, 236
    frames = [flat(), with_dot(x, y, side=28)]
    blank, dotted = tracker_features(adapter, frames, stride=14)
    difference = (dotted - blank).norm(dim=1)[0].flatten().double()
    weight = (difference - difference.quantile(0.98)).clamp(min=0)  # the rest is attention
    centre = (weight[:, None] * coordinates(14)).sum(dim=0) / weight.sum()
    assert (centre - torch.tensor([x, y])).abs().max() < 2.5


def test_patch_14_is_left_as_the_backbone_gives_it() -> None:
    frame = torch.randint(0, 256, (3, 476, 854), dtype=torch.uint8)
    for stride in GRIDS:
        adapter = small_adapter(14, stride)
        (features,) = tracker_features(adapter, [frame], stride=stride)
        torch.testing.assert_close(features[:, :48], adapter(frame)[None], rtol=0, atol=0)
        assert not features[:, 48:].any()


def test_frames_of_another_size_are_mapped_onto_the_same_cells() -> None:
    adapter = small_adapter(14, 14)
    geometry = adapter.geometry(238, 427, size=(476, 854))
    grid = torch.randn(2, 48, 34, 61)
    torch.testing.assert_close(arrange(grid, geometry, stride=14)[:, :48], grid, rtol=0, atol=0)
    enlarged = rearrange(arrange(grid, geometry, stride=7), "n c h w -> n h w c")
    torch.testing.assert_close(
        rearrange(enlarged[:, ::2, ::2, :48], "n h w c -> n c h w"), grid, rtol=0, atol=1e-5
    )


def test_best_buddies_follow_a_shift() -> None:
    wide = torch.randint(0, 256, (3, 34, 70), generator=torch.Generator().manual_seed(0))
    wide = wide.repeat_interleave(14, dim=1).repeat_interleave(14, dim=2).to(torch.uint8)
    frames = [wide[:, :, left : left + 854] for left in (28, 0)]
    features = torch.cat(list(tracker_features(small_adapter(14, 14), frames, stride=14)))
    source, target = best_buddies(features, 0, 1, stride=14)
    assert len(source) > 1000
    moved = (target - source == torch.tensor([28.0, 0.0])).all(dim=1)
    assert moved.float().mean() > 0.95


def test_features_can_be_fused() -> None:
    adapter = small_adapter(14, 14)
    frames = [with_dot(100 + 14 * step, 100) for step in range(3)]
    fused = torch.cat(list(tracker_features(adapter, frames, stride=14, temporal_fusion="causal")))
    tokens, features = adapter(torch.stack(frames), return_backbone=True)
    expected = temporal_fusion(features, adapter._guide(tokens), mode="causal")
    torch.testing.assert_close(fused[:, :48], expected)


@pytest.mark.parametrize("stride", GRIDS)
def test_its_residual_fits(stride: int) -> None:
    features = next(tracker_features(small_adapter(14, 14), [with_dot(100, 100)], stride=stride))
    torch.testing.assert_close(refined(features, stride), features)


def test_lengths_are_the_backbones_own() -> None:
    adapter = small_adapter(14, 14)
    features = next(tracker_features(adapter, [with_dot(100, 100)], stride=14))
    lengths = features.norm(dim=1)
    assert float(lengths.min()) > 0
    torch.testing.assert_close(lengths, adapter(with_dot(100, 100))[None].norm(dim=1))
    assert float((lengths - 1).abs().min()) > 0.1


@pytest.mark.parametrize(("value", "what"), [(0.0, "zero"), (float("nan"), "not finite")])
def test_features_that_would_break_its_losses(value: float, what: str) -> None:
    features = torch.ones(2, 8, 34, 61)
    features[1, :, 3, 4] = value
    with pytest.raises(DinoTrackerError, match=f"frame 6 at row 3, column 4 is {what}"):
        arrange(features, cells(14), stride=14, number=5)


def test_too_many_channels() -> None:
    with pytest.raises(DinoTrackerError, match=r"small-vit14 has 1040 channels.*at most 1024"):
        next(tracker_features(small_adapter(14, width=1040), [flat()]))


def test_backbones_that_cannot_overlap_keep_their_step() -> None:
    asked: list[int | None] = []

    def load(stride: int | None = None) -> CoSettleAdapter:
        asked.append(stride)
        if stride is not None:
            raise GeometryError("feature maps have no stride to choose")
        return small_adapter(14)

    assert load_overlapping(load, 7).backbone.stride == 14
    assert asked == [7, None]
    assert load_overlapping(lambda stride: small_adapter(16, stride), 7).backbone.stride == 7


def test_frames_are_those_of_load_video(tmp_path: Path) -> None:
    names = ["2.png", "10.png", "1.jpg", ".0.png", "notes.txt", "3.jpeg", "4.PNG"]
    for seed, name in enumerate(names):
        noise = torch.randint(
            0, 256, (120, 160, 3), generator=torch.Generator().manual_seed(seed)
        ).to(torch.uint8)
        if not name.endswith("txt"):
            Image.fromarray(noise.numpy()).save(tmp_path / name)
        else:
            (tmp_path / name).write_text("no image")
    files = image_files(tmp_path)
    assert [path.name for path in files] == [".0.png", "1.jpg", "10.png", "2.png"]
    for path in files:
        with Image.open(path) as image:
            expected = transforms.ToTensor()(image.resize((854, 476), Image.Resampling.LANCZOS))
        torch.testing.assert_close(read_frame(path) / 255, expected, rtol=0, atol=1e-7)


def test_frames_it_could_not_take(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(FrameError, match=r"a\.png is an image of mode RGBA.*RGB alone"):
        read_frame(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(FrameError, match=r"b\.png cannot be read as an image"):
        read_frame(tmp_path / "b.png")


def test_the_real_backbone_sees_a_dot(real_adapter: CoSettleAdapter) -> None:
    row, col = 12, 40
    frames = [flat(), with_dot(7 + 14 * col, 7 + 14 * row)]
    blank, dotted = tracker_features(real_adapter, frames, stride=14, batch_size=2)
    difference = (dotted - blank).norm(dim=1)[0]
    assert divmod(int(difference.argmax()), 61) == (row, col)
    assert float(dotted.norm(dim=1).mean()) > 5
