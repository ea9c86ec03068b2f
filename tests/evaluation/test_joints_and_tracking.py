from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.joints import decode_joints, joint_heat_maps, propagate_joints
from cosettle_adapter.evaluation.palette import colours, save_labels
from cosettle_adapter.evaluation.tracking import track_queries
from cosettle_adapter.video.geometry import plan_geometry


def drifting(frames: int = 5, h: int = 8, w: int = 12) -> Tensor:
    """Features ``(T, C, h, w)`` of a texture that moves one cell to the right a frame.

    What leaves on the right comes in on the left, so that every cell has a match.
    """
    texture = torch.randn(32, h, w, generator=torch.Generator().manual_seed(0))
    return torch.stack([texture.roll(t, dims=2) for t in range(frames)])


@given(st.floats(1.0, 6.0), st.floats(1.0, 10.0))
def test_a_joint_survives_its_heat_map(row: float, column: float) -> None:
    heat = joint_heat_maps(torch.tensor([[row, column]]), (8, 12))
    cells, found = decode_joints(heat)
    assert found.all()
    assert float((cells - torch.tensor([[row, column]])).abs().max()) < 0.2


def test_a_heat_map_is_a_gaussian_of_half_a_cell() -> None:
    heat = joint_heat_maps(torch.tensor([[2.0, 3.0]]), (5, 7))[0]
    assert heat[2, 3] == 1
    assert float(heat[2, 4]) == pytest.approx(np.exp(-1 / (2 * 0.5**2)))
    assert float(heat[3, 4]) == pytest.approx(np.exp(-2 / (2 * 0.5**2)))


@pytest.mark.parametrize(("outside", "found"), [(-1.0, True), (-2.5, False), (-7.0, False)])
def test_a_joint_well_outside_the_frame_is_not_drawn(outside: float, found: bool) -> None:
    heat = joint_heat_maps(torch.tensor([[outside, 3.0]]), (5, 7))
    assert decode_joints(heat)[1].tolist() == [found]


def test_decoding_weighs_the_five_best_cells() -> None:
    heat = torch.zeros(1, 4, 5)
    heat[0, 1, 1], heat[0, 1, 3] = 3.0, 1.0
    cells, found = decode_joints(heat)
    torch.testing.assert_close(cells, torch.tensor([[1.0, 1.5]]))
    heat += 0.01  # what the other cells add comes from the three best of them only
    cells, _ = decode_joints(heat)
    assert float((cells - torch.tensor([[1.0, 1.5]])).abs().max()) < 0.05
    assert found.all()


def test_an_empty_heat_map_gives_no_joint() -> None:
    cells, found = decode_joints(torch.zeros(2, 3, 4, 5))
    assert not found.any()
    assert torch.isfinite(cells).all()


def test_joints_are_carried_along() -> None:
    start = torch.tensor([[2.0, 1.0], [5.0, 4.0]])
    cells, found = propagate_joints(drifting(), start, context=2, radius=3, topk=1)
    assert found.all()
    for t in range(5):
        expected = start + torch.tensor([0.0, t])
        assert float((cells[t] - expected).abs().max()) < 0.35, t


def test_queries_are_tracked_both_ways_in_pixels() -> None:
    geometry = plan_geometry(80, 120, patch=16, size=(128, 192))
    points = torch.tensor([[55.0, 35.0], [45.0, 25.0]], dtype=torch.float64)
    tracks = track_queries(drifting(), [2, 4], points, geometry, radius_argmax=0)
    assert tracks.xy.shape == (2, 5, 2)
    for t in range(5):  # a cell is 10 pixels of the original frame
        expected = torch.stack([points[:, 0] + 10 * (t - torch.tensor([2, 4])), points[:, 1]], 1)
        torch.testing.assert_close(tracks.xy[:, t], expected)
        assert float(tracks.cycle_error[0, t]) == 0


def test_a_point_outside_is_moved_to_the_edge() -> None:
    geometry = plan_geometry(128, 192, patch=16)
    tracks = track_queries(
        drifting(), [0], torch.tensor([[-30.0, 500.0]]), geometry, radius_argmax=0
    )
    assert tracks.xy[0, 0].tolist() == [8.0, 120.0]


def test_a_query_in_no_frame_is_an_error() -> None:
    geometry = plan_geometry(128, 192, patch=16)
    with pytest.raises(FrameError, match="frames 9 to 9, expected 0 to 4"):
        track_queries(drifting(), [9], torch.zeros(1, 2), geometry)


def test_no_queries_no_tracks() -> None:
    geometry = plan_geometry(128, 192, patch=16)
    assert track_queries(drifting(), [], torch.zeros(0, 2), geometry).xy.shape == (0, 5, 2)


def test_the_palette_is_daviss() -> None:
    table = colours()
    assert len(table) == 768
    first = [tuple(table[3 * label : 3 * label + 3]) for label in range(9)]
    assert first == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
    ]


@settings(max_examples=10)
@given(st.integers(0, 255))
def test_labels_survive_a_palette_png(tmp_path_factory: pytest.TempPathFactory, label: int) -> None:
    path = tmp_path_factory.mktemp("png") / "deeper" / "00000.png"
    labels = np.full((5, 7), label, dtype=np.uint8)
    labels[2:, 3:] = 0
    save_labels(labels, path)
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels)
