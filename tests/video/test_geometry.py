from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video import Geometry, apply_geometry, plan_geometry, resample_to_points

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


@pytest.mark.parametrize(
    ("frame", "options", "resized", "padded", "grid"),
    [
        ((224, 448), {}, (224, 448), (224, 448), (16, 32)),
        ((480, 854), {"size": 224}, (224, 392), (224, 392), (16, 28)),
        ((480, 854), {}, (476, 854), (476, 854), (34, 61)),
        ((480, 854), {"fit": "pad"}, (480, 854), (490, 854), (35, 61)),
        ((480, 854), {"size": 224, "fit": "pad"}, (224, 399), (224, 406), (16, 29)),
        ((480, 854), {"size": (224, 224), "fit": "pad"}, (126, 224), (224, 224), (16, 16)),
        ((1, 3000), {"size": (28, 28), "fit": "pad"}, (1, 28), (28, 28), (2, 2)),
        ((480, 854), {"size": 224, "stride": 7}, (224, 399), (224, 399), (31, 56)),
        ((224, 230), {"stride": 4, "fit": "pad"}, (224, 230), (226, 230), (54, 55)),
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


@given(geometries(), st.integers(0, 2**32))
def test_pixels_and_cells_are_inverse_on_whole_patches(geometry: Geometry, seed: int) -> None:
    for side, resized, cells in zip(geometry.padded, geometry.resized, geometry.grid, strict=True):
        assert side == geometry.patch + (cells - 1) * geometry.stride
        assert 0 <= side - resized < (geometry.patch if geometry.fit == "pad" else 1)
    values = json.loads(json.dumps(geometry.to_dict()))
    assert Geometry.from_dict(values) == geometry
    del values["stride"]
    with pytest.raises(GeometryError, match=r"is not a geometry: .*'stride'"):
        Geometry.from_dict(values)
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([geometry.frame[1], geometry.frame[0]], dtype=torch.float64)
    points = extent * torch.rand(5, 4, 2, generator=generator, dtype=torch.float64)
    cells = geometry.pixels_to_cells(points)
    torch.testing.assert_close(geometry.cells_to_pixels(cells), points, rtol=1e-12, atol=1e-9)
    rows = torch.arange(geometry.grid[0], dtype=torch.float64)[:, None]
    centres = geometry.cell_centers()
    assert centres.shape == (*geometry.grid, 2)
    found = geometry.pixels_to_cells(centres)[..., 0]
    torch.testing.assert_close(found, rows.expand_as(found), rtol=1e-12, atol=1e-9)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 64, {}), "frame height 10 is smaller than one patch of 14; pass size="),
        ((64, 10, {"fit": "pad"}), "frame width 10 is smaller than one patch of 14; pass size="),
        ((64.5, 64, {}), "frame height must be a whole number of at least 1, got 64.5"),
        ((64, 64, {"size": 0}), "size must be a whole number of at least 1, got 0"),
        ((64, 64, {"size": (224,)}), r"size must be \(height, width\), got \(224,\)"),
        ((64, 64, {"size": (225, 224)}), "size height 225 is not .*: 224 and 238"),
        ((64, 64, {"size": (224, 226), "stride": 7}), "size width 226 is not .*: 224 and 231"),
        ((64, 64, {"stride": 15}), "stride 15 would skip pixels; use one from 1 to patch 14"),
        ((64, 64, {"stride": 0}), "stride must be a whole number of at least 1, got 0"),
        ((64, 64, {"fit": "crop"}), "got fit='crop', expected 'resize' or 'pad'"),
    ],
)
def test_errors(arguments: tuple[int, int, dict[str, object]], message: str) -> None:
    height, width, options = arguments
    with pytest.raises(GeometryError, match=message):
        plan_geometry(height, width, patch=14, **options)  # type: ignore[arg-type]


def test_resizing_is_antialiased_bicubic_in_float32() -> None:
    frames = torch.randint(0, 256, (2, 3, 60, 90), dtype=torch.uint8)
    assert apply_geometry(frames, plan_geometry(60, 90, patch=30)) is frames
    for scale, dtype in ((1, torch.uint8), (255, torch.float16), (255, torch.float64)):
        given = frames if scale == 1 else (frames / scale).to(dtype)
        resized = apply_geometry(given, plan_geometry(60, 90, patch=14, size=(28, 42)))
        expected = F.interpolate(given.float(), size=(28, 42), mode="bicubic", antialias=True)
        assert resized.dtype == torch.float32
        torch.testing.assert_close(resized, expected.clamp(0, 255 if scale == 1 else 1))
    edge = torch.zeros(1, 3, 30, 30)
    edge[..., 15:] = 1  # where bicubic overshoots
    resized = apply_geometry(edge, plan_geometry(30, 30, patch=14, size=98))
    assert (resized.min(), resized.max()) == (0, 1)


def test_padding_repeats_the_bottom_and_right_edge_and_keeps_bytes() -> None:
    frames = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    padded = apply_geometry(frames, plan_geometry(20, 30, patch=14, fit="pad"))
    expected = F.pad(frames.float(), (0, 12, 0, 8), mode="replicate")
    assert padded.dtype == torch.uint8
    torch.testing.assert_close(padded.float(), expected)


def test_a_device_without_the_kernel_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    interpolate = F.interpolate

    def missing_at_first(*args: object, **options: object) -> torch.Tensor:
        calls.append(options)
        if len(calls) == 1:
            raise NotImplementedError("no such kernel")
        return interpolate(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "interpolate", missing_at_first)
    resized = apply_geometry(torch.rand(1, 3, 30, 30), plan_geometry(30, 30, patch=14))
    assert resized.shape == (1, 3, 28, 28)
    assert len(calls) == 2


@settings(max_examples=30)
@given(
    st.integers(14, 300),
    st.integers(14, 300),
    st.integers(1, 14),
    st.sampled_from(["resize", "pad"]),
)
def test_sampling_at_cell_centres_returns_the_cells(
    height: int, width: int, stride: int, fit: str
) -> None:
    geometry = plan_geometry(height, width, patch=14, stride=stride, fit=fit)  # type: ignore[arg-type]
    features = torch.randn(2, 5, *geometry.grid)
    sampled = resample_to_points(features, geometry, geometry.cell_centers())
    torch.testing.assert_close(sampled, features, rtol=0, atol=1e-6)


def test_sampling_is_bilinear_between_centres_and_takes_the_border_beyond() -> None:
    square = plan_geometry(56, 56, patch=14)
    features = torch.randn(1, 3, 4, 4)
    outside = torch.tensor([[-100.0, -100.0], [0.0, 21.0], [100.0, 1e6], [56.0, 0.0]])
    sampled = resample_to_points(features, square, outside)
    torch.testing.assert_close(sampled[0], features[0, :, [0, 1, 3, 0], [0, 0, 3, 3]])
    geometry = plan_geometry(300, 500, patch=14, stride=7, size=98)
    centres = geometry.cell_centers()
    features = torch.stack([3 * centres[..., 0] - 2 * centres[..., 1], centres[..., 0]])[None]
    low, high = centres[0, 0], centres[-1, -1]
    points = low + (high - low) * torch.rand(50, 2, dtype=torch.float64)
    sampled = resample_to_points(features, geometry, points)
    expected = torch.stack([3 * points[:, 0] - 2 * points[:, 1], points[:, 0]])[None]
    torch.testing.assert_close(sampled, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sampling_keeps_dtype_and_shape_and_gradients(dtype: torch.dtype) -> None:
    geometry = plan_geometry(56, 70, patch=14)
    features = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    sampled = resample_to_points(features, geometry, torch.rand(6, 7, 2) * 50)
    assert (sampled.shape, sampled.dtype) == ((2, 3, 6, 7), dtype)
    sampled.float().sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad.float().sum(), torch.tensor(252.0), rtol=0.02, atol=0)
    assert resample_to_points(features, geometry, torch.zeros(0, 2)).shape == (2, 3, 0)


def test_what_does_not_fit_is_refused() -> None:
    geometry = plan_geometry(56, 56, patch=14)
    with pytest.raises(GeometryError, match=r"\(1, 3, 56, 28\).*planned for \(T, 3, 56, 56\)"):
        apply_geometry(torch.zeros(1, 3, 56, 28), geometry)
    features = torch.zeros(1, 2, 4, 4)
    with pytest.raises(GeometryError, match=r"\(1, 2, 5, 4\), expected \(T, C, 4, 4\)"):
        resample_to_points(torch.zeros(1, 2, 5, 4), geometry, torch.zeros(1, 2))
    with pytest.raises(GeometryError, match=r"\(2,\), expected \(N, 2\) or \(hh, ww, 2\)"):
        resample_to_points(features, geometry, torch.zeros(2))
    with pytest.raises(GeometryError, match="NaN or infinite"):
        resample_to_points(features, geometry, torch.tensor([[0.0, float("nan")]]))


@pytest.mark.gpu
def test_the_gpu_agrees() -> None:
    geometry = plan_geometry(210, 330, patch=14, size=140, fit="pad")
    frames = torch.randint(0, 256, (2, 3, 210, 330), dtype=torch.uint8)
    torch.testing.assert_close(
        apply_geometry(frames.cuda(), geometry).cpu(), apply_geometry(frames, geometry)
    )
    features = torch.randn(2, 5, *geometry.grid)
    points = torch.rand(40, 2) * 200
    sampled = resample_to_points(features.cuda(), geometry, points)
    torch.testing.assert_close(sampled.cpu(), resample_to_points(features, geometry, points))
