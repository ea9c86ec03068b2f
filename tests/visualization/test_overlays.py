"""Masks and tracks drawn on frames, in colours that any reader can tell apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from einops import rearrange

from cosettle_adapter.video import plan_geometry
from cosettle_adapter.visualization import (
    colour_scale,
    distinct_colours,
    draw_tracks,
    overlay_masks,
)

WHITE = torch.full((1, 3), 255, dtype=torch.uint8)
# Machado et al. 2009, severity 1, on linear RGB
BLINDNESS = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "none": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_objects_can_be_told_apart_without_seeing_red_or_green(kind: str) -> None:
    linear = (distinct_colours(7) / 255).float() ** 2.2
    seen = (linear @ torch.tensor(BLINDNESS[kind]).T).clamp(0, 1) ** (1 / 2.2)
    closest = min(float((a - b).norm()) for a, b in itertools.combinations(seen, 2))
    assert closest > 0.12


def test_every_thing_has_a_colour_of_its_own_and_the_scale_becomes_lighter() -> None:
    for count in (0, 1, 7, 8, 60):
        colours = distinct_colours(count)
        assert (colours.shape, colours.dtype) == ((count, 3), torch.uint8)
        assert len({tuple(colour) for colour in colours.tolist()}) == count
    values = torch.linspace(0, 1, 101)
    lightness = colour_scale(values).float() @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 0).all()
    assert lightness[0] < 2
    assert lightness[-1] > 240
    beyond = colour_scale(torch.tensor([[-3.0, 0.0], [1.0, 9.0]]))
    assert torch.equal(beyond[:, 0], beyond[:, 1])


def black(frames: int = 2, height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.zeros(frames, 3, height, width, dtype=torch.uint8)


def squares() -> torch.Tensor:
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
    half = painted[0, :, 15, 15].int() - first.int() // 2
    assert half.abs().max() <= 1
    line = (painted[0] == first[:, None, None]).all(dim=0)
    assert int(line.sum()) == 20**2 - 16**2, "two pixels wide, inside"
    assert not painted[0, :, 2, 2].any()
    assert not painted[0, :, 9, 40].any(), "void is no object"
    frames = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    assert torch.equal(overlay_masks(frames, torch.full((2, 40, 60), 255)), frames)


def test_ids_bools_and_one_mask_an_object_look_the_same() -> None:
    ids = squares()
    by_object = torch.stack([ids == 1, ids == 2], dim=1)
    expected = overlay_masks(black(), ids)
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
    both = overlay_masks(
        black(1), torch.ones(1, 2, 40, 60), opacity=1.0, contour=0, colours=WHITE.expand(2, 3)
    )
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


@pytest.mark.parametrize(
    ("frames", "masks", "options", "message"),
    [
        (black(), squares()[:, :4, :6], {}, r"\(2, 4, 6\).*\(2, 40, 60\).*geometry="),
        (black(), squares().float(), {}, r"floats in \[0, 1\]"),
        (black(), 3 * torch.ones(2, 1, 40, 60), {}, r"floats in \[0, 1\]"),
        (black(), squares().int() - 1, {}, "from -1 to"),
        (black(), squares(), {"colours": WHITE}, r"expected \(2, 3\) uint8"),
        (squares(), squares(), {}, r"frames of shape \(2, 40, 60\)"),
        (black(), squares(), {"geometry": plan_geometry(80, 60, patch=10)}, "planned for"),
        (black(), squares(), {"opacity": 1.5}, r"opacity=1\.5"),
        (black(), squares(), {"contour": -1}, "contour=-1"),
    ],
)
def test_masks_that_do_not_fit_are_told(
    frames: torch.Tensor, masks: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        overlay_masks(frames, masks, **options)


def rightwards(frames: int = 8) -> torch.Tensor:
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
    assert not light[:, :20].any()
    short = draw_tracks(frames, rightwards(), trail=2, radius=3)
    assert not short[7, :, :, :60].any()
    assert short[7, :, :, 66].any()
    assert not draw_tracks(frames, rightwards(), trail=0, radius=3)[7, :, :, :78].any()
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


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (7, {}, r"expected \(8, N, 2\)"),
        (8, {"visible": torch.ones(8, 2, dtype=torch.bool)}, r"visible of shape \(8, 2\)"),
        (8, {"colours": WHITE.float()}, r"expected \(1, 3\) uint8"),
        (8, {"trail": -1}, "trail=-1"),
        (8, {"radius": 0}, "radius=0"),
    ],
)
def test_tracks_that_do_not_fit_are_told(
    length: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_tracks(black(8, 60, 100), rightwards(length), **options)
