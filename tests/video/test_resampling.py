from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter.errors import GeometryError
from cosettle_adapter.video import apply_geometry, plan_geometry, resample_to_points


def ramp(geometry_height: int, geometry_width: int) -> torch.Tensor:
    """A picture whose colour is a linear function of the pixel's centre."""
    y = (torch.arange(geometry_height) + 0.5) / geometry_height
    x = (torch.arange(geometry_width) + 0.5) / geometry_width
    return torch.stack([x.expand(geometry_height, -1), y[:, None].expand(-1, geometry_width)])


def test_frames_that_fit_come_back_untouched() -> None:
    frames = torch.randint(0, 256, (2, 3, 28, 42), dtype=torch.uint8)
    assert apply_geometry(frames, plan_geometry(28, 42, patch=14)) is frames


def test_resizing_is_antialiased_bicubic_in_float32() -> None:
    frames = torch.randint(0, 256, (2, 3, 60, 90), dtype=torch.uint8)
    geometry = plan_geometry(60, 90, patch=14, size=(28, 42))
    resized = apply_geometry(frames, geometry)
    expected = F.interpolate(frames.float(), size=(28, 42), mode="bicubic", antialias=True)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, expected.clamp(0, 255))


@pytest.mark.parametrize(("dtype", "top"), [(torch.uint8, 255), (torch.float32, 1)])
def test_the_range_is_kept_where_bicubic_overshoots(dtype: torch.dtype, top: int) -> None:
    edge = torch.zeros(1, 3, 30, 30)
    edge[..., 15:] = top
    resized = apply_geometry(edge.to(dtype), plan_geometry(30, 30, patch=14, size=98))
    assert resized.min() == 0
    assert resized.max() == top


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_resized_in_float32(dtype: torch.dtype) -> None:
    frames = torch.rand(1, 3, 30, 30).to(dtype)
    resized = apply_geometry(frames, plan_geometry(30, 30, patch=14))
    assert resized.dtype == torch.float32
    assert resized.shape == (1, 3, 28, 28)


def test_padding_repeats_the_bottom_and_right_edge_and_keeps_bytes() -> None:
    frames = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    padded = apply_geometry(frames, plan_geometry(20, 30, patch=14, fit="pad"))
    expected = F.pad(frames.float(), (0, 12, 0, 8), mode="replicate")
    assert padded.dtype == torch.uint8
    torch.testing.assert_close(padded.float(), expected)


def test_frames_of_another_size_are_refused() -> None:
    geometry = plan_geometry(28, 42, patch=14)
    with pytest.raises(GeometryError, match=r"\(1, 3, 42, 28\).*planned for \(T, 3, 28, 42\)"):
        apply_geometry(torch.zeros(1, 3, 42, 28), geometry)
    with pytest.raises(GeometryError, match="call plan_geometry"):
        apply_geometry(torch.zeros(3, 28, 42), geometry)


def test_a_device_without_the_kernel_falls_back_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_sampling_is_bilinear_between_centres() -> None:
    geometry = plan_geometry(300, 500, patch=14, stride=7, size=98)
    centres = geometry.cell_centers()
    features = torch.stack([3 * centres[..., 0] - 2 * centres[..., 1], centres[..., 0]])[None]
    low, high = centres[0, 0], centres[-1, -1]
    points = low + (high - low) * torch.rand(50, 2, dtype=torch.float64)
    sampled = resample_to_points(features, geometry, points)
    expected = torch.stack([3 * points[:, 0] - 2 * points[:, 1], points[:, 0]])[None]
    torch.testing.assert_close(sampled, expected)


def test_points_outside_take_the_border_cells() -> None:
    geometry = plan_geometry(56, 56, patch=14)
    features = torch.randn(1, 3, 4, 4)
    points = torch.tensor([[-100.0, -100.0], [0.0, 21.0], [100.0, 1e6], [56.0, 0.0]])
    sampled = resample_to_points(features, geometry, points)
    expected = features[0, :, [0, 1, 3, 0], [0, 0, 3, 3]]
    torch.testing.assert_close(sampled[0], expected)


def test_a_grid_of_one_cell_is_the_same_everywhere() -> None:
    geometry = plan_geometry(14, 14, patch=14)
    features = torch.randn(2, 3, 1, 1)
    sampled = resample_to_points(features, geometry, torch.rand(6, 2) * 14)
    torch.testing.assert_close(sampled, features[..., 0].expand(-1, -1, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sampling_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    geometry = plan_geometry(56, 70, patch=14)
    features = torch.randn(2, 3, 4, 5).to(dtype)
    sampled = resample_to_points(features, geometry, torch.rand(6, 7, 2) * 50)
    assert sampled.shape == (2, 3, 6, 7)
    assert sampled.dtype == dtype
    assert resample_to_points(features, geometry, torch.zeros(0, 2)).shape == (2, 3, 0)


def test_sampling_passes_gradients_to_the_features() -> None:
    geometry = plan_geometry(56, 56, patch=14)
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    resample_to_points(features, geometry, torch.rand(5, 2) * 56).sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad.sum(), torch.tensor(2 * 3 * 5.0))


def test_what_cannot_be_sampled() -> None:
    geometry = plan_geometry(56, 56, patch=14)
    features = torch.zeros(1, 2, 4, 4)
    with pytest.raises(GeometryError, match=r"\(1, 2, 5, 4\), expected \(T, C, 4, 4\)"):
        resample_to_points(torch.zeros(1, 2, 5, 4), geometry, torch.zeros(1, 2))
    with pytest.raises(GeometryError, match=r"\(2,\), expected \(N, 2\) or \(hh, ww, 2\)"):
        resample_to_points(features, geometry, torch.zeros(2))
    with pytest.raises(GeometryError, match="NaN or infinite"):
        resample_to_points(features, geometry, torch.tensor([[0.0, float("nan")]]))


def test_resizing_and_sampling_agree_on_where_pixels_are() -> None:
    geometry = plan_geometry(210, 330, patch=14, size=(140, 196))
    frames = torch.cat([ramp(210, 330), torch.zeros(1, 210, 330)])[None]
    seen = apply_geometry(frames, geometry)
    # one cell's feature is the colour around its centre
    cells = F.avg_pool2d(seen, kernel_size=14, stride=14)
    inner = geometry.cell_centers()[1:-1, 1:-1]
    sampled = resample_to_points(cells, geometry, inner)[0]
    torch.testing.assert_close(sampled[0], (inner[..., 0] / 330).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sampled[1], (inner[..., 1] / 210).float(), rtol=0, atol=1e-3)


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
