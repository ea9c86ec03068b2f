from __future__ import annotations

import pytest
import torch
from einops import rearrange

from cosettle_adapter.errors import FrameError
from cosettle_adapter.visualization import draw_tracks

pytest.importorskip("PIL.Image")

WHITE = torch.full((1, 3), 255, dtype=torch.uint8)


def black(frames: int = 8, height: int = 60, width: int = 100) -> torch.Tensor:
    return torch.zeros(frames, 3, height, width, dtype=torch.uint8)


def rightwards(frames: int = 8) -> torch.Tensor:
    """One point that goes right by ten pixels a frame, at y = 30."""
    x = 15.0 + 10 * torch.arange(frames)
    return rearrange([x, torch.full_like(x, 30.0)], "xy t -> t 1 xy")


def test_points_lie_where_they_are_and_their_trails_where_they_were() -> None:
    drawn = draw_tracks(black(), rightwards(), radius=3, colours=WHITE)
    assert drawn.shape == black().shape
    assert drawn.dtype == torch.uint8
    light = drawn.float().mean(dim=1)
    for t in range(8):
        centre = 15 + 10 * t
        assert light[t, 30, centre - 1 : centre + 1].min() > 250
        assert not light[t, :, centre + 8 :].any(), "nothing ahead of it"
    row = light[7, 30]
    assert row[20] < row[40] < row[60], "the trail fades"
    assert row[20] > 0
    assert not light[:, :20].any()


def test_trails_end_where_they_shall() -> None:
    drawn = draw_tracks(black(), rightwards(), trail=2, radius=3)
    assert not drawn[7, :, :, :60].any()
    assert drawn[7, :, :, 66].any()
    none = draw_tracks(black(), rightwards(), trail=0, radius=3)
    assert not none[7, :, :, :78].any()


def test_hidden_points_are_rings_with_thin_trails() -> None:
    hidden = torch.zeros(8, 1, dtype=torch.bool)
    options = {"radius": 5.0, "colours": WHITE}
    ring = draw_tracks(black(), rightwards(), hidden, **options).float().mean(dim=1)
    disc = draw_tracks(black(), rightwards(), **options).float().mean(dim=1)
    assert disc[0, 30, 15] > 250
    assert ring[0, 30, 15] == 0
    assert ring[0, 30, 10:20].max() > 200
    column = slice(0, 60), 70  # across the trail of the last frame
    assert 0 < (ring[7][column] > 0).sum() < (disc[7][column] > 0).sum()


def test_frames_keep_their_pixels_elsewhere() -> None:
    frames = torch.randint(0, 256, (8, 3, 60, 100), dtype=torch.uint8)
    drawn = draw_tracks(frames, rightwards(), radius=3)
    assert torch.equal(drawn[:, :, :20], frames[:, :, :20])


def test_points_that_nobody_knows_or_that_left_are_not_drawn() -> None:
    positions = rightwards()
    positions[3:5] = torch.nan
    positions[6:] = 1e4
    drawn = draw_tracks(black(), positions, trail=0)
    assert [bool(frame.any()) for frame in drawn] == [True, True, True, False, False, True] + (
        [False] * 2
    )
    with_trails = draw_tracks(black(), positions)
    assert with_trails[3].any(), "what was seen before stays as a trail"


def test_no_points_at_all_leave_the_clip_alone() -> None:
    frames = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    assert torch.equal(draw_tracks(frames, torch.zeros(2, 0, 2)), frames)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(FrameError, match=r"expected \(8, N, 2\)"):
        draw_tracks(black(), rightwards(7))
    with pytest.raises(FrameError, match=r"visible of shape \(8, 2\)"):
        draw_tracks(black(), rightwards(), torch.ones(8, 2, dtype=torch.bool))
    with pytest.raises(FrameError, match=r"torch.float32, expected \(8, 1\) bool"):
        draw_tracks(black(), rightwards(), torch.ones(8, 1))
    with pytest.raises(FrameError, match=r"expected \(1, 3\) uint8"):
        draw_tracks(black(), rightwards(), colours=WHITE.float())
    with pytest.raises(ValueError, match="trail=-1"):
        draw_tracks(black(), rightwards(), trail=-1)
    with pytest.raises(ValueError, match="radius=0"):
        draw_tracks(black(), rightwards(), radius=0)
