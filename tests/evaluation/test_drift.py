from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.evaluation import drift, evaluate, rendered, rendered_clips, rendered_protocol
from cosettle_adapter.evaluation.drift import Correspondence, cycle_consistent, temporal_drift
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
    found = temporal_drift(features, in_place(6))
    assert found == pytest.approx(noisy**2 / (1 + noisy**2), abs=0.05)
    assert drift.drift_by_gap(features, {1: in_place(6), 9: []}) == {"drift@1": found}
    tokens = rearrange(features, "t c h w -> t (h w) c").double()
    tokens = torch.nn.functional.normalize(tokens - tokens.mean((0, 1)), dim=-1)
    same = (1 - (tokens[1:] * tokens[:-1]).sum(-1)).mean()
    any_two = torch.stack([1 - a @ b.T for a, b in itertools.pairwise(tokens)]).mean()
    assert found == pytest.approx(float(same / any_two), rel=0.1, abs=1e-6), "its definition"
    assert temporal_drift(3 * features - 5, in_place(6)) == pytest.approx(found, rel=1e-3, abs=1e-6)


def test_where_there_is_nothing_to_measure_it_is_nan() -> None:
    assert math.isnan(temporal_drift(torch.ones(4, 2, H, W), in_place(4)))
    assert math.isnan(temporal_drift(still(4), []))
    assert math.isnan(drift.match_accuracy(still(4), []))


@pytest.mark.parametrize("gap", [1, 3])
def test_correspondences_of_a_pan(gap: int) -> None:
    features, clip = panning(5)
    pairs = drift.true_correspondences(clip, GEOMETRY, gap)
    assert [found.frames for found in pairs] == [(t, t + gap) for t in range(5 - gap)]
    for true, matched in zip(pairs, drift.mutual_correspondences(features, gap), strict=True):
        assert matched.frames == true.frames
        assert len(true.patches) == H * (W - gap), "columns that left the frame have none"
        assert (true.patches[:, 0] - true.patches[:, 1] == gap).all()
        known = {tuple(pair) for pair in true.patches.tolist()}
        assert known <= {tuple(pair) for pair in matched.patches.tolist()}
    assert temporal_drift(features, pairs) == 0
    assert drift.match_accuracy(features, pairs) == 1
    assert drift.mutual_correspondences(features, 5) == []


PHOTO, CUTOUT = (255 * torch.rand(2, 3, 120, 160, generator=torch.manual_seed(0))).byte()


def test_hidden_patches_do_not_correspond_and_the_object_takes_its_own_along() -> None:
    clip = render_clip(PHOTO, cutout=CUTOUT, frames=6, size=(96, 128), amount=0.5, seed=2)
    assert clip.object_mask is not None
    rows, columns = SMALL.cell_centers().long().flip(-1).unbind(-1)
    on_object = clip.object_mask[:, rows, columns].flatten(1)
    (start, end), patches = drift.true_correspondences(clip, SMALL, 4)[1]
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
    found = drift.true_correspondences(clip, SMALL, 5)[0].patches
    assert found[:, 0].tolist() == kept.nonzero()[:, 0].tolist()
    assert found[:, 1].tolist() == (rows * 16 + columns)[kept].tolist()


def test_patches_between_later_frames_follow_the_motion_between_them() -> None:
    clip = render_clip(PHOTO, frames=6, size=(96, 128), motion="mixed", amount=0.5, seed=2)
    centres = SMALL.cell_centers().flatten(0, 1).double()
    _, patches = drift.true_correspondences(clip, SMALL, 4)[1]
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
    assert drift.match_accuracy(moved, pairs) == (off < 2)


@pytest.mark.parametrize("gap", [1, 2])
def test_cycles_equal_their_definition(gap: int) -> None:
    features = noise(4, 3, 4, 5)
    unit, home = torch.nn.functional.normalize(features, dim=1), []
    for t, i, j in itertools.product(range(4 - gap), range(4), range(5)):
        there = (unit[t, :, i, j, None, None] * unit[t + gap]).sum(0).argmax().item()
        back = unit[t + gap, :, there // 5, there % 5, None, None]
        home.append((back * unit[t]).sum(0).argmax().item() == i * 5 + j)
    found = cycle_consistent(7 * features, gap=gap)
    assert found.shape == (4 - gap, 4, 5)
    assert found.flatten().tolist() == home
    assert 0.05 < sum(home) / len(home) < 0.95
    chance = cycle_consistent(torch.ones(3, 4, 5, 5)).float().mean()
    assert chance == pytest.approx(1 / 25)


def test_what_does_not_fit_is_described() -> None:
    four = torch.zeros(2, 4, 3, 3)
    for error, message, features, gap in (
        (GeometryError, r"\(4, 3, 3\).*expected floats of shape \(T, C, h, w", four[0], 1),
        (GeometryError, r"torch\.uint8", four.byte(), 1),
        (FrameError, "got 1 frames, expected at least 2", four[:1], 1),
        (ValueError, "gap=0", four, 0),
    ):
        with pytest.raises(error, match=message):
            cycle_consistent(features, gap=gap)


def known_pan() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, points, positions and visibility of the pan."""
    features, clip = panning(4)
    points = rearrange(GEOMETRY.cell_centers()[:, 3:], "h w xy -> (h w) xy")
    return (features, points, *clip.track(points))


@pytest.mark.parametrize(("size", "scale"), [((96, 128), 1), ((192, 256), 2)])
def test_tracking_error_is_in_pixels_of_the_frame_not_of_the_resized_one(
    size: tuple[int, int], scale: int
) -> None:
    features, points, positions, visible = known_pan()
    geometry = plan_geometry(*size, patch=16, size=(96, 128))
    points, positions = points * scale, positions * scale
    exact = drift.tracking_error(features, geometry, points, positions, visible)
    assert exact["mean"] < 0.1 * scale
    assert exact["pck@4"] == exact["pck@16"] == 1.0
    positions[1:, :, 1] += 7.0 * scale
    off = drift.tracking_error(features, geometry, points, positions, visible, thresholds=(8, 15))
    assert off["median"] == pytest.approx(7 * scale, abs=0.1)
    assert (off["pck@8"], off["pck@15"]) == (2 - scale, 1.0)


def test_hidden_points_and_the_first_frame_do_not_count() -> None:
    features, points, positions, visible = known_pan()
    positions[0] += 50
    positions[2, :4] += 50
    visible[2, :4] = False
    given = features, GEOMETRY, points
    figures = drift.tracking_error(*given, positions, visible, thresholds=(4,))
    assert (figures["pck@4"], figures["count"]) == (1.0, 3 * 30 - 4)
    with pytest.raises(GeometryError, match=r"positions of shape \(3, 30, 2\)"):
        drift.tracking_error(*given, positions[:3], visible)
    with pytest.raises(FrameError, match="visible after frame 0"):
        drift.tracking_error(*given, positions, torch.zeros_like(visible))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photographs, and smaller clips of them."""
    monkeypatch.setattr(rendered, "SIZE", (64, 96))
    once = functools.lru_cache(maxsize=1)(rendered._rendered.__wrapped__)
    monkeypatch.setattr(rendered, "_rendered", once)
    for name in ("one", "two"):
        pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((300, 200)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_folder_of_photographs_is_scored_by_its_true_motion(
    photos: Path, tiny_adapter: CoSettleAdapter
) -> None:
    protocol = rendered_protocol(photos, clips=["one-zoom"])
    result = evaluate(protocol, tiny_adapter, size=(64, 96))
    assert list(result.clips) == ["one-zoom"]
    assert result.settings["drift"] == "true motion"
    names = {f"{what}@{gap}" for what in ("match", "drift") for gap in (1, 4, 8)}
    for figures in result.total.values():
        assert figures.keys() == names
        assert all(math.isfinite(value) for value in figures.values())
        assert 0 < figures["match@8"] <= figures["match@1"] <= 1
        assert 0 < figures["drift@1"] < figures["drift@8"]


def test_clips_are_the_same_whenever_they_are_read(photos: Path) -> None:
    clips = rendered_clips()
    assert len({clip.name for clip in clips}) == len(clips) == 12
    before = clips[0].read_annotations().frames.clone()
    assert clips[3].read_annotations().object_mask is not None
    assert torch.equal(clips[0].read_annotations().frames, before)
    assert clips[0].read_frame(3).shape == (64, 96, 3)


def test_what_cannot_be_rendered_is_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="no rendered clip 'one-tilt'"):
        rendered_clips(photos, clips=["one-tilt"])
    (photos / "one.png").rename(photos / "two.jpg")
    with pytest.raises(FrameError, match="several photographs for 'two-zoom'"):
        rendered_clips(photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrameError, match="empty holds no image files; found nothing"):
        rendered_clips(tmp_path / "empty")
