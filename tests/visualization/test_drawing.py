"""Masks, tracks, similarity and PCA colours drawn on frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from pictures import uneven
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video import Geometry, plan_geometry, resample_to_points
from cosettle_adapter.visualization import (
    colour_scale,
    distinct_colours,
    draw_tracks,
    fit_pca,
    overlay_masks,
    pca,
    pca_frames,
    similarity_frames,
    similarity_maps,
    similarity_peaks,
)

from helpers import noise

WHITE = torch.full((1, 3), 255, dtype=torch.uint8)


def test_every_thing_has_a_colour_of_its_own_and_the_scale_becomes_lighter() -> None:
    for count in (0, 1, 7, 8, 60):
        colours = distinct_colours(count)
        assert (colours.shape, colours.dtype) == ((count, 3), torch.uint8)
        assert len({tuple(colour) for colour in colours.tolist()}) == count
    lightness = colour_scale(torch.linspace(0, 1, 101)).float() @ torch.tensor([0.21, 0.72, 0.07])
    assert (lightness.diff() > 0).all()
    beyond = colour_scale(torch.tensor([[-3.0, 0.0], [1.0, 9.0]]))
    assert torch.equal(beyond[:, 0], beyond[:, 1])


def black(frames: int = 2, height: int = 40, width: int = 60) -> Tensor:
    return torch.zeros(frames, 3, height, width, dtype=torch.uint8)


def squares() -> Tensor:
    """Ids of two squares, of which one wears a rim that is nothing."""
    ids = torch.zeros(2, 40, 60, dtype=torch.uint8)
    ids[:, 5:25, 5:25] = 1
    ids[:, 10:30, 35:55] = 2
    ids[:, 9, 35:55] = 255
    return ids


def test_objects_are_tinted_and_lined_in_their_colours() -> None:
    painted = overlay_masks(black(), squares(), opacity=0.5, contour=2)
    first, second = distinct_colours(2)
    assert torch.equal(painted[0, :, 5, 5], first)
    assert torch.equal(painted[1, :, 11, 36], second)
    assert (painted[0, :, 15, 15].int() - first.int() // 2).abs().max() <= 1
    line = (painted[0] == first[:, None, None]).all(dim=0)
    assert int(line.sum()) == 20**2 - 16**2, "two pixels wide, inside"
    assert not painted[0, :, 2, 2].any()
    assert not painted[0, :, 9, 40].any(), "void is no object"
    frames = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    assert torch.equal(overlay_masks(frames, torch.full((2, 40, 60), 255)), frames)


def test_ids_bools_and_one_mask_an_object_look_the_same() -> None:
    ids = squares()
    by_object, expected = torch.stack([ids == 1, ids == 2], dim=1), overlay_masks(black(), ids)
    assert torch.equal(overlay_masks(black(), by_object), expected)
    assert torch.equal(overlay_masks(black(), by_object.float()), expected)
    alone = overlay_masks(black(), ids == 1)
    assert torch.equal(alone, overlay_masks(black(), (ids == 1).to(torch.int64)))


def test_soft_masks_tint_softly_and_are_lined_where_they_win() -> None:
    soft = torch.zeros(1, 1, 40, 60)
    soft[..., 20:] = torch.linspace(0, 1, 40)
    painted = overlay_masks(black(1), soft, contour=0)[0].float().mean(dim=0)
    assert (painted[:, 21:].diff(dim=1) >= 0).all()
    assert painted[0, -1] > painted[0, 40] > painted[0, 25]
    lined = overlay_masks(black(1), soft, contour=1)[0]
    at_line = (lined == distinct_colours(1)[0][:, None, None]).all(dim=0).nonzero()
    assert set(at_line[:, 1].tolist()) == {40}, "where it passes a half"
    white = {"opacity": 1.0, "contour": 0, "colours": WHITE.expand(2, 3)}
    both = overlay_masks(black(1), torch.ones(1, 2, 40, 60), **white)
    assert (both == 255).all(), "what overlaps is no brighter"


def test_masks_on_the_grid_follow_the_geometry() -> None:
    geometry = plan_geometry(40, 60, patch=10)
    grid = torch.zeros(1, 1, 4, 6)
    grid[..., 1:3, 2:4] = 1
    painted = overlay_masks(black(1), grid, geometry=geometry, contour=0)[0].float().mean(0)
    assert painted[20, 30] == painted.max()
    assert painted[:, :14].max() == 0
    torch.testing.assert_close(painted, painted.flip(0), atol=1, rtol=0)
    torch.testing.assert_close(painted, painted.flip(1), atol=1, rtol=0)


def rightwards(frames: int = 8) -> Tensor:
    """One point that goes right by ten pixels a frame, at y = 30."""
    x = 15.0 + 10 * torch.arange(frames)
    return rearrange([x, torch.full_like(x, 30.0)], "xy t -> t 1 xy")


def test_points_lie_where_they_are_and_their_trails_where_they_were() -> None:
    frames = black(8, 60, 100)
    drawn = draw_tracks(frames, rightwards(), radius=3, colours=WHITE)
    assert (drawn.shape, drawn.dtype) == (frames.shape, torch.uint8)
    light = drawn.float().mean(dim=1)
    for t in range(8):
        centre = 15 + 10 * t
        assert light[t, 30, centre - 1 : centre + 1].min() > 250
        assert not light[t, :, centre + 8 :].any(), "nothing ahead of it"
    row = light[7, 30]
    assert 0 < row[20] < row[40] < row[60], "the trail fades"
    short = draw_tracks(frames, rightwards(), trail=2, radius=3)
    assert not short[7, :, :, :60].any()
    assert short[7, :, :, 66].any()
    noisy = torch.randint(0, 256, (8, 3, 60, 100), dtype=torch.uint8)
    assert torch.equal(draw_tracks(noisy, rightwards(), radius=3)[:, :, :20], noisy[:, :, :20])
    assert torch.equal(draw_tracks(noisy, torch.zeros(8, 0, 2)), noisy)


def test_hidden_points_are_rings_with_thin_trails() -> None:
    frames, hidden = black(8, 60, 100), torch.zeros(8, 1, dtype=torch.bool)
    ring, disc = (
        draw_tracks(frames, rightwards(), seen, radius=5.0, colours=WHITE).float().mean(dim=1)
        for seen in (hidden, ~hidden)
    )
    assert disc[0, 30, 15] > 250
    assert ring[0, 30, 15] == 0
    assert ring[0, 30, 10:20].max() > 200
    column = slice(0, 60), 70  # across the trail of the last frame
    assert 0 < (ring[7][column] > 0).sum() < (disc[7][column] > 0).sum()


def test_points_that_nobody_knows_or_that_left_are_not_drawn() -> None:
    positions = rightwards()
    positions[3:5] = torch.nan
    positions[6:] = 1e4
    drawn = draw_tracks(black(8, 60, 100), positions, trail=0)
    seen = [bool(frame.any()) for frame in drawn]
    assert seen == [True, True, True, False, False, True, False, False]
    with_trails = draw_tracks(black(8, 60, 100), positions)
    assert with_trails[3].any(), "what was seen before stays as a trail"


def moving(frames: int = 4) -> tuple[Tensor, Geometry]:
    """Random features that move right by one cell a frame, of frames 60 x 90 at patch 10."""
    row = noise(16, 6, 9 + frames)
    clip = torch.stack([row[:, :, frames - t : frames - t + 9] for t in range(frames)])
    return clip, plan_geometry(60, 90, patch=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_peak_goes_with_the_feature(dtype: torch.dtype) -> None:
    clip, geometry = moving()
    maps = similarity_maps(clip.to(dtype), geometry, (35, 25), frame=0)
    assert (maps.dtype, maps.shape) == (torch.float32, (4, 6, 9))
    expected = torch.tensor([[35.0 + 10 * t, 25.0] for t in range(4)], dtype=torch.float64)
    assert torch.equal(similarity_peaks(maps, geometry), expected)
    torch.testing.assert_close(maps.amax(dim=(1, 2)), torch.ones(4), atol=2e-3, rtol=0)


def test_maps_are_cosines_with_the_point_of_the_named_frame() -> None:
    clip, geometry = moving()
    maps = similarity_maps(clip, geometry, (85, 5), frame=2)
    unit = F.normalize(clip, dim=1)
    expected = (unit * rearrange(unit[2, :, 0, 8], "c -> c 1 1")).sum(dim=1)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    assert torch.equal(similarity_maps(clip, geometry, (85, 5), frame=-2), maps)
    between = similarity_maps(clip, geometry, (40, 25))[0, 2]
    assert between[3] == pytest.approx(float(between[4]), abs=1e-5)
    assert between[3] > 0.5, "between two cells both count"


def test_heat_is_brightest_at_the_peak_and_grey_where_nothing_is_alike() -> None:
    _, geometry = moving()
    maps = torch.full((3, 6, 9), -0.5)
    maps[:, 1, 7] = 1.0
    frames = black(3, 60, 90) + 100
    frames[:, 0] += 80  # reddish
    heated = similarity_frames(frames, maps, geometry, mark_peaks=False)
    brightness = heated.float().mean(dim=1)
    assert (brightness[:, 15, 75] > brightness[:, 45, 20] + 50).all()
    assert heated[0, :, 45, 20].unique().numel() == 1
    marked = similarity_frames(frames, maps, geometry)
    ring = (marked != heated).any(dim=1)[0].nonzero().float()
    assert len(ring) > 10
    torch.testing.assert_close(ring.mean(dim=0) + 0.5, torch.tensor([15.0, 75.0]), atol=0.3, rtol=0)
    quarter, options = torch.full((3, 6, 9), 0.25), {"limits": (0, 0.25), "mark_peaks": False}
    stretched = similarity_frames(frames, quarter, geometry, **options)
    wide = similarity_frames(frames, 4 * quarter, geometry, mark_peaks=False)
    assert torch.equal(stretched, wide), "limits stretch the colours"


CLIP, GEOMETRY = moving()
MAPS = similarity_maps(CLIP, GEOMETRY, (35, 25))
TRACKED, GREY = black(8, 60, 100), black(4, 60, 90)


def test_what_does_not_fit_is_told() -> None:
    for draw, arguments, options, message in (
        (overlay_masks, (black(), squares()[:, :4, :6]), {}, r"\(2, 4, 6\).*\(2, 40, 60\).*geom"),
        (overlay_masks, (black(), squares().float()), {}, r"floats in \[0, 1\]"),
        (overlay_masks, (black(), 3 * torch.ones(2, 1, 40, 60)), {}, r"floats in \[0, 1\]"),
        (overlay_masks, (black(), squares().int() - 1), {}, "from -1 to"),
        (overlay_masks, (black(), squares()), {"colours": WHITE}, r"expected \(2, 3\) uint8"),
        (overlay_masks, (squares(), squares()), {}, r"frames of shape \(2, 40, 60\)"),
        (overlay_masks, (black(), squares()), {"geometry": GEOMETRY}, "planned for"),
        (overlay_masks, (black(), squares()), {"opacity": 1.5}, r"opacity=1\.5"),
        (overlay_masks, (black(), squares()), {"contour": -1}, "contour=-1"),
        (draw_tracks, (TRACKED, rightwards(7)), {}, r"expected \(8, N, 2\)"),
        (draw_tracks, (TRACKED, rightwards(), torch.ones(8, 2) > 0), {}, r"visible of .*\(8, 2\)"),
        (draw_tracks, (TRACKED, rightwards()), {"trail": -1}, "trail=-1"),
        (draw_tracks, (TRACKED, rightwards()), {"radius": 0}, "radius=0"),
        (similarity_maps, (CLIP, GEOMETRY, (35, 25)), {"frame": 4}, "frame=4 of a clip of 4"),
        (similarity_maps, (CLIP, GEOMETRY, (91, 25)), {}, r"\(91, 25\).*90 x 60"),
        (similarity_maps, (CLIP, GEOMETRY, (float("nan"), 25)), {}, "nan"),
        (similarity_frames, (GREY, MAPS, GEOMETRY), {"limits": (1, 1)}, r"limits=\(1, 1\), expec"),
        (similarity_frames, (GREY, MAPS[:3], GEOMETRY), {}, r"expected \(4, h, w\)"),
        (similarity_frames, (GREY[:, :, :30], MAPS, GEOMETRY), {}, r"frames of \(30, 90\) pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(*arguments, **options)  # type: ignore[operator]


def test_components_are_the_principal_ones() -> None:
    features = uneven()
    basis = fit_pca(features)
    tokens = rearrange(features, "t c h w -> (t h w) c").double()
    expected = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    overlap = (basis.components.double() * expected.Vh[:3]).sum(dim=-1).abs()
    torch.testing.assert_close(overlap, torch.ones(3, dtype=torch.float64))
    mirrored = fit_pca(features * torch.tensor([1.0, -1] * 4)[:, None, None])
    for each in (basis, mirrored):
        assert (each.components.gather(1, each.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_one_range_serves_the_whole_clip() -> None:
    features = uneven(frames=4)
    features[2] *= 2  # a frame that stands out must look it, not be normalised away
    basis = fit_pca(features)
    whole = pca_frames(features, basis, size=(12, 14))
    single = torch.cat([pca_frames(frame[None], basis, size=(12, 14)) for frame in features])
    assert torch.equal(whole, single)
    colours = basis.colours(features)
    assert float((colours <= 0).float().mean()) == pytest.approx(0.01, abs=0.01)
    assert float((colours >= 1).float().mean()) == pytest.approx(0.01, abs=0.01)


def test_a_sample_is_drawn_from_the_whole_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "_SAMPLES", 60)
    features = noise(8, 4, 5, 5)
    features[6:, 0] *= 100  # what varies most does so at the end
    basis = fit_pca(features)
    assert 0.99 < basis.components[0, 0] < 1 - 1e-6
    assert torch.equal(basis.components, fit_pca(features).components)
    half = fit_pca(features.half())
    torch.testing.assert_close(half.components, basis.components, atol=1e-2, rtol=0)


def test_aligned_colours_undo_a_rotation_within_the_components() -> None:
    raw = uneven(frames=4)
    reference = fit_pca(raw)
    target, expected = reference.scores(raw), reference.colours(raw)
    turned = torch.einsum("dc,tchw->tdhw", torch.linalg.qr(noise(8, 8, seed=5))[0], raw)
    aligned = fit_pca(turned, align_to=target)
    torch.testing.assert_close(aligned.colours(turned), expected, atol=1e-3, rtol=1e-3)
    free = fit_pca(-turned).colours(-turned)
    assert (fit_pca(-turned, align_to=target).colours(-turned) - free).abs().max() > 0.1
    aligned = fit_pca(raw, align_to=noise(4, 3, 6, 7, seed=9))
    projected = aligned.components @ reference.components.T @ reference.components
    torch.testing.assert_close(projected, aligned.components, atol=1e-5, rtol=1e-4)


def test_pictures_have_the_size_asked_for_and_show_patches() -> None:
    features = uneven(frames=2, h=2, w=3)
    basis = fit_pca(features)
    patches = pca_frames(features, basis, size=(20, 30))
    assert (patches.shape, patches.dtype) == ((2, 3, 20, 30), torch.uint8)
    assert (patches[:, :, :10, :10] == patches[:, :, :1, :1]).all()
    smooth = pca_frames(features, basis, size=(20, 30), mode="bilinear")
    assert not (smooth[:, :, :10, :10] == smooth[:, :, :1, :1]).all()


def test_errors_say_what_was_got_and_what_to_do() -> None:
    features = uneven()
    for error, message, given, reference in (
        (GeometryError, r"\(8, 6, 7\).*features\[None\]", features[0], None),
        (GeometryError, "126 patches of 2 channels", features[:, :2], None),
        (FrameError, "NaN or infinite", features.masked_fill(features > 10, torch.nan), None),
        (GeometryError, r"align_to of shape \(3, 8, 6, 7\)", features, features),
    ):
        with pytest.raises(error, match=message):
            fit_pca(given, align_to=reference)
    with pytest.raises(GeometryError, match="4 channels, but the basis was fitted on 8"):
        fit_pca(features).scores(uneven(channels=4))


PLAN = plan_geometry(40, 60, patch=10)


class NoFloat64(Tensor):
    """A tensor that refuses to become float64 unless it moves to the CPU first."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return result.as_subclass(Tensor)
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return result


def pictures(frames: Tensor, features: Tensor) -> list[Tensor]:
    """Everything that draws or resamples."""
    tracks, maps = 40 * features[:, 0, :, :2], similarity_maps(features, PLAN, (9, 20))
    reference = fit_pca(features)
    aligned = fit_pca(features.flip(1), align_to=reference.scores(features))
    return [
        draw_tracks(frames, tracks),
        overlay_masks(frames, features.sigmoid() / 8, geometry=PLAN),
        overlay_masks(frames, (frames[:, 0] > 99).long()),
        similarity_frames(frames, maps, PLAN),
        similarity_peaks(features[:, 0], PLAN),
        resample_to_points(features, PLAN, PLAN.cell_centers()),
        resample_to_points(features, PLAN, tracks[0]),
        pca_frames(features.flip(1), aligned, size=PLAN.frame),
    ]


def test_nothing_becomes_float64_on_devices_that_do_not_have_it() -> None:
    frames = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
    features = torch.rand(3, 8, 4, 6)
    drawn = pictures(frames.as_subclass(NoFloat64), features.as_subclass(NoFloat64))
    for found, expected in zip(drawn, pictures(frames, features), strict=True):
        torch.testing.assert_close(found.cpu(), expected)
