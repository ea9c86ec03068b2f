from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video import Geometry, plan_geometry

sides = st.integers(60, 600)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    patch = draw(st.integers(4, 32))
    return plan_geometry(
        draw(sides),
        draw(sides),
        patch=patch,
        stride=draw(st.integers(patch // 4, patch)),
        size=draw(st.none() | st.integers(1, 300)),
        fit=draw(st.sampled_from(["resize", "pad"])),
    )


def test_a_frame_of_whole_patches_is_left_alone() -> None:
    geometry = plan_geometry(224, 448, patch=14)
    assert geometry.frame == geometry.resized == geometry.padded == (224, 448)
    assert geometry.grid == (16, 32)
    assert geometry.scale == (1.0, 1.0)


@pytest.mark.parametrize(
    ("frame", "options", "resized", "padded", "grid"),
    [
        ((480, 854), {"size": 224}, (224, 392), (224, 392), (16, 28)),
        ((854, 480), {"size": 224}, (392, 224), (392, 224), (28, 16)),
        ((480, 854), {}, (476, 854), (476, 854), (34, 61)),
        ((231, 225), {}, (238, 224), (238, 224), (17, 16)),
        ((480, 854), {"fit": "pad"}, (480, 854), (490, 854), (35, 61)),
        ((480, 854), {"size": 224, "fit": "pad"}, (224, 399), (224, 406), (16, 29)),
        ((480, 854), {"size": (224, 224)}, (224, 224), (224, 224), (16, 16)),
        ((480, 854), {"size": (224, 224), "fit": "pad"}, (126, 224), (224, 224), (16, 16)),
        ((1, 3000), {"size": (28, 28), "fit": "pad"}, (1, 28), (28, 28), (2, 2)),
        ((480, 854), {"size": 224, "stride": 7}, (224, 399), (224, 399), (31, 56)),
        ((224, 230), {"stride": 4, "fit": "pad"}, (224, 230), (226, 230), (54, 55)),
        ((100, 100), {"size": 3}, (14, 14), (14, 14), (1, 1)),
        ((9, 9), {"size": 28}, (28, 28), (28, 28), (2, 2)),
    ],
)
def test_policy(
    frame: tuple[int, int],
    options: dict[str, object],
    resized: tuple[int, int],
    padded: tuple[int, int],
    grid: tuple[int, int],
) -> None:
    geometry = plan_geometry(*frame, patch=14, **options)  # type: ignore[arg-type]
    assert (geometry.resized, geometry.padded, geometry.grid) == (resized, padded, grid)


@given(geometries())
def test_the_encoder_always_sees_whole_patches(geometry: Geometry) -> None:
    for side, cells in zip(geometry.padded, geometry.grid, strict=True):
        assert side == geometry.patch + (cells - 1) * geometry.stride
    if geometry.fit == "pad":
        for side, resized in zip(geometry.padded, geometry.resized, strict=True):
            assert resized <= side
            assert side - resized < max(geometry.stride, geometry.patch)


@given(geometries(), st.integers(0, 2**32))
def test_pixels_and_cells_are_inverse(geometry: Geometry, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([geometry.frame[1], geometry.frame[0]], dtype=torch.float64)
    points = extent * torch.rand(5, 4, 2, generator=generator, dtype=torch.float64)
    cells = geometry.pixels_to_cells(points)
    torch.testing.assert_close(geometry.cells_to_pixels(cells), points, rtol=1e-12, atol=1e-9)
    again = geometry.pixels_to_cells(geometry.cells_to_pixels(cells))
    torch.testing.assert_close(again, cells, rtol=1e-12, atol=1e-9)


@given(geometries())
def test_cell_centres(geometry: Geometry) -> None:
    centres = geometry.cell_centers()
    assert centres.shape == (*geometry.grid, 2)
    assert centres.dtype == torch.float64
    i, j = (cells - 1 for cells in geometry.grid)
    sy, sx = geometry.scale
    expected = (
        (geometry.patch / 2 + geometry.stride * j) / sx,
        (geometry.patch / 2 + geometry.stride * i) / sy,
    )
    assert centres[i, j].tolist() == pytest.approx(expected, rel=1e-12)
    cells = geometry.pixels_to_cells(centres)
    rows = torch.arange(i + 1, dtype=torch.float64)[:, None].expand(-1, j + 1)
    torch.testing.assert_close(cells[..., 0], rows, rtol=1e-12, atol=1e-9)


def test_cells_tile_a_frame_evenly() -> None:
    geometry = plan_geometry(448, 448, patch=14, size=224)
    assert geometry.cell_centers()[0, 0].tolist() == [14.0, 14.0]
    assert geometry.cell_centers()[2, 1].tolist() == [42.0, 70.0]
    # the middle of the frame lies between four cells
    assert geometry.pixels_to_cells(torch.tensor([224.0, 224.0])).tolist() == [7.5, 7.5]


def test_coordinates_keep_their_dtype() -> None:
    geometry = plan_geometry(64, 64, patch=16)
    assert geometry.cells_to_pixels(torch.zeros(2, dtype=torch.float32)).dtype == torch.float32
    assert geometry.cells_to_pixels(torch.zeros(2, dtype=torch.int64)).dtype == torch.float64
    with pytest.raises(GeometryError, match=r"points of shape \(4, 3\).*\(x, y\) last"):
        geometry.pixels_to_cells(torch.zeros(4, 3))
    with pytest.raises(GeometryError, match=r"cells of shape \(\).*\(row, col\) last"):
        geometry.cells_to_pixels(torch.tensor(1.0))


@given(geometries())
def test_dictionary_round_trip(geometry: Geometry) -> None:
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_dictionaries_that_are_no_geometry() -> None:
    fields = plan_geometry(64, 64, patch=16).to_dict()
    with pytest.raises(GeometryError, match=r"missing \['stride'\], unknown \['step'\]"):
        Geometry.from_dict({("step" if k == "stride" else k): v for k, v in fields.items()})
    with pytest.raises(GeometryError, match=r"frame must be \(height, width\), got 64"):
        Geometry.from_dict({**fields, "frame": 64})
    with pytest.raises(GeometryError, match="padded height 80 does not go with resized height 64"):
        Geometry.from_dict({**fields, "padded": [80, 64]})
    with pytest.raises(GeometryError, match="padded height 48 does not go with"):
        Geometry.from_dict({**fields, "padded": [48, 64], "fit": "pad"})
    with pytest.raises(GeometryError, match="padded width 65 is not"):
        Geometry.from_dict({**fields, "padded": [64, 65]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 64, {}), "frame height 10 is smaller than one patch of 14; pass size="),
        ((64, 10, {"fit": "pad"}), "frame width 10 is smaller than one patch of 14; pass size="),
        ((0, 64, {}), "frame height must be a whole number of at least 1, got 0"),
        ((64, -3, {}), "frame width must be a whole number of at least 1, got -3"),
        ((64.5, 64, {}), "frame height must be a whole number of at least 1, got 64.5"),
        ((64, 64, {"size": 0}), "size must be a whole number of at least 1, got 0"),
        ((64, 64, {"size": (224, 0)}), "size width must be a whole number of at least 1, got 0"),
        ((64, 64, {"size": (224,)}), r"size must be \(height, width\), got \(224,\)"),
        ((64, 64, {"size": (225, 224)}), "size height 225 is not .*: 224 and 238"),
        ((64, 64, {"size": (224, 9)}), "size width 9 is not .*: 14 and 28"),
        ((64, 64, {"size": (224, 226), "stride": 7}), "size width 226 is not .*: 224 and 231"),
        ((64, 64, {"stride": 15}), "stride 15 is larger than patch 14"),
        ((64, 64, {"stride": 0}), "stride must be a whole number of at least 1, got 0"),
        ((64, 64, {"fit": "crop"}), "got fit='crop', expected 'resize' or 'pad'"),
    ],
)
def test_errors(arguments: tuple[int, int, dict[str, object]], message: str) -> None:
    height, width, options = arguments
    with pytest.raises(GeometryError, match=message):
        plan_geometry(height, width, patch=14, **options)  # type: ignore[arg-type]
