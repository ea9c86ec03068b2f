from __future__ import annotations

import pytest
import torch

from cosettle_adapter.errors import FrameError, GeometryError
from cosettle_adapter.video import plan_geometry
from cosettle_adapter.visualization import distinct_colours, overlay_masks


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


def test_masks_that_overlap_do_not_grow_brighter_than_one() -> None:
    both = torch.ones(1, 2, 40, 60)
    painted = overlay_masks(black(1), both, opacity=1.0, contour=0, colours=_white(2))
    assert (painted == 255).all()


def test_masks_on_the_grid_follow_the_geometry() -> None:
    geometry = plan_geometry(40, 60, patch=10)
    grid = torch.zeros(1, 1, 4, 6)
    grid[..., 1:3, 2:4] = 1
    painted = overlay_masks(black(1), grid, geometry=geometry, contour=0)[0].float().mean(0)
    assert painted[20, 30] == painted.max()
    assert painted[:, :14].max() == 0
    torch.testing.assert_close(painted, painted.flip(0), atol=1, rtol=0)
    torch.testing.assert_close(painted, painted.flip(1), atol=1, rtol=0)


def test_chunks_of_frames_are_alike() -> None:
    geometry = plan_geometry(40, 60, patch=10)
    grid = torch.rand(1, 2, 4, 6).expand(19, 2, 4, 6) / 2
    painted = overlay_masks(black(19), grid, geometry=geometry)
    assert (painted == painted[:1]).all()


def test_a_clip_without_objects_stays_as_it_is() -> None:
    frames = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    assert torch.equal(overlay_masks(frames, squares() * 0), frames)
    assert torch.equal(overlay_masks(frames, torch.full((2, 40, 60), 255)), frames)


def test_masks_that_do_not_fit_are_told() -> None:
    ids = squares()
    with pytest.raises(FrameError, match=r"\(2, 4, 6\).*\(2, 40, 60\).*geometry="):
        overlay_masks(black(), ids[:, :4, :6])
    with pytest.raises(FrameError, match="floats in \\[0, 1\\]"):
        overlay_masks(black(), ids.float())
    with pytest.raises(FrameError, match="floats in \\[0, 1\\]"):
        overlay_masks(black(), 3 * torch.ones(2, 1, 40, 60))
    with pytest.raises(FrameError, match="mask id -1"):
        overlay_masks(black(), ids.int() - 1)
    with pytest.raises(FrameError, match=r"expected \(2, 3\) uint8"):
        overlay_masks(black(), ids, colours=_white(3))
    with pytest.raises(FrameError, match=r"frames of shape \(2, 40, 60\)"):
        overlay_masks(ids, ids)
    with pytest.raises(GeometryError, match="planned for"):
        overlay_masks(black(), torch.zeros(2, 1, 4, 6), geometry=plan_geometry(80, 60, patch=10))
    with pytest.raises(ValueError, match=r"opacity=1\.5"):
        overlay_masks(black(), ids, opacity=1.5)
    with pytest.raises(ValueError, match="contour=-1"):
        overlay_masks(black(), ids, contour=-1)


def _white(count: int) -> torch.Tensor:
    return torch.full((count, 3), 255, dtype=torch.uint8)
