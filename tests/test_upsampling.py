"""Pixel-dense features: against an independent interpolation, edges, memory, and the adapter's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.upsampling import COLOUR, DISTANCE, Upsampler, upsample
from cosettle_adapter.video import plan_geometry, resample_to_points

from helpers import noise

UPSAMPLERS: list[Upsampler] = ["bilinear", "guided"]


def coloured(height: int, width: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_bilinear_is_torchs_interpolation_where_patches_span_the_frame() -> None:
    geometry, features = plan_geometry(56, 84, patch=14), noise(2, 5, 4, 6)
    for size, times in (("input", 14), ((8, 12), 2)):
        expected = F.interpolate(features, scale_factor=times, mode="bilinear")
        found = upsample(features, geometry, size)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    half = upsample(features.half(), geometry, (8, 12))
    assert half.dtype == torch.float16


@settings(max_examples=25)
@given(
    frame=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    stride=st.sampled_from([3, 5, 8]),
    size=st.none() | st.integers(16, 60),
    fit=st.sampled_from(["resize", "pad"]),
    dense=st.just("input") | st.tuples(st.integers(1, 50), st.integers(1, 50)),
    tile=st.integers(1, 9),
)
def test_pixels_are_those_of_the_given_frame_and_tiles_change_nothing(
    frame: tuple[int, int], stride: int, size: Any, fit: Any, dense: Any, tile: int
) -> None:
    geometry = plan_geometry(*frame, patch=8, stride=stride, size=size, fit=fit)
    features, frames = noise(2, 3, *geometry.grid), coloured(*frame)
    sides = frame if dense == "input" else dense
    y, x = ((torch.arange(n) + 0.5) * (f / n) for n, f in zip(sides, frame, strict=True))
    pixels = torch.stack(torch.meshgrid(x.double(), y.double(), indexing="xy"), dim=-1)
    found = upsample(features, geometry, dense, tile=tile)
    expected = resample_to_points(features, geometry, pixels)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    whole, tiled, constant = (
        upsample(values, geometry, dense, frames=frames, upsampler="guided", tile=side)
        for values, side in ((features, 99), (features, tile), (torch.ones_like(features), tile))
    )
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(constant, torch.ones_like(constant), atol=1e-5, rtol=0)


def test_guided_is_the_mean_of_the_paper() -> None:
    geometry, features, frames = plan_geometry(30, 36, patch=6), noise(1, 4, 5, 6), coloured(30, 36)
    found = upsample(features, geometry, "input", frames=frames[:1], upsampler="guided")
    colours = frames[0].double() / 255
    for y, x in ((17, 20), (0, 0), (29, 3)):
        total, weights = torch.zeros(4, dtype=torch.float64), 0.0
        for a in range(5):
            for b in range(6):
                down, across = (y + 0.5) / 6 - 0.5 - a, (x + 0.5) / 6 - 0.5 - b
                down = down if 0 <= down + a <= 4 else max(0, min(4, down + a)) - a
                across = across if 0 <= across + b <= 5 else max(0, min(5, across + b)) - b
                if max(abs(down), abs(across)) >= 2.5:
                    continue
                mean = colours[:, 6 * a : 6 * a + 6, 6 * b : 6 * b + 6].mean((1, 2))
                apart = (down**2 + across**2) / (2 * DISTANCE**2)
                differ = float((colours[:, y, x] - mean).square().sum()) / (2 * COLOUR**2)
                weight = float(torch.tensor(-apart - differ).double().exp())
                total, weights = total + weight * features[0, :, a, b], weights + weight
        torch.testing.assert_close(found[0, :, y, x].double(), total / weights, atol=1e-5, rtol=0)


def test_guided_features_change_where_the_colour_does() -> None:
    frame = torch.full((1, 3, 64, 64), 0.2)
    inside = (torch.arange(64)[:, None] + torch.arange(64) > 60)[None]  # cuts through patches
    frame[:, :, inside[0]] = 0.8
    geometry = plan_geometry(64, 64, patch=8)
    features = F.avg_pool2d(inside[:, None].float(), 8).round()  # a patch has one colour's feature
    right = {
        name: float(
            ((upsample(features, geometry, "input", frames=frame, upsampler=name) > 0.5) == inside)
            .float()
            .mean()
        )
        for name in UPSAMPLERS
    }
    assert right["guided"] > 0.99 > 0.98 > right["bilinear"]


def test_memory_beyond_the_result_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosettle_adapter import upsampling

    sizes = []

    def recorded(weights: torch.Tensor, values: torch.Tensor, pattern: str) -> torch.Tensor:
        result = torch.einsum(pattern.replace(" ", ""), weights, values)
        if "->t" in pattern.replace(" ", ""):
            sizes.append(max(weights.numel(), result.numel()))
        return result

    monkeypatch.setattr(upsampling, "einsum", recorded)
    geometry, features = plan_geometry(80, 160, patch=8), noise(1, 64, 10, 20)
    frames = coloured(80, 160, count=1)
    dense = upsample(features, geometry, "input", frames=frames, upsampler="guided")
    assert len(sizes) == 3 * 5
    assert max(sizes) <= (4 * 8) ** 2 * 64 < dense.numel() / 10


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
def test_the_adapter_returns_pixels_of_its_frames(
    tiny_adapter: CoSettleAdapter, upsampler: Upsampler
) -> None:
    frames = coloured(50, 65, count=4)
    options: dict[str, Any] = {"size": 64, "fit": "pad"}
    how: dict[str, Any] = {"upsampler": upsampler, "normalize": True}
    geometry = tiny_adapter.geometry(50, 65, **options)
    expected = F.normalize(
        upsample(
            tiny_adapter(frames, **options), geometry, "input", frames=frames, upsampler=upsampler
        ),
        dim=1,
    )
    found = tiny_adapter(frames, dense="input", batch_size=3, **options, **how)
    assert found.shape == (4, 192, 50, 65)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    tokens, single = tiny_adapter(
        frames[0], dense=(7, 9), upsampler=upsampler, return_backbone=True
    )
    assert (tokens.shape, single.shape) == ((192, 3, 4), (192, 7, 9))
    streamed = tiny_adapter.stream(frames, dense="input", batch_size=3, **options, **how)
    torch.testing.assert_close(
        torch.cat([chunk.features for chunk in streamed]), expected, atol=1e-5, rtol=0
    )
    fused = list(tiny_adapter.stream(frames, temporal_fusion="symmetric", batch_size=3))
    dense = tiny_adapter.stream(
        frames, temporal_fusion="symmetric", batch_size=3, dense=(9, 13), upsampler=upsampler
    )
    for chunk, coarse in zip(dense, fused, strict=True):
        guide = frames[chunk.start : chunk.start + 3]
        expected = upsample(
            coarse.features, chunk.geometry, (9, 13), frames=guide, upsampler=upsampler
        )
        torch.testing.assert_close(chunk.features, expected, atol=1e-5, rtol=0)


def test_settled_features_are_settled_before_they_are_dense(tiny_adapter: CoSettleAdapter) -> None:
    settling, frames = CoSettleAdapter.raw(tiny_adapter.backbone), coloured(48, 64)
    settling.settles = True
    expected = upsample(settling(frames), settling.geometry(48, 64), "input")
    torch.testing.assert_close(settling(frames, dense="input"), expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_told() -> None:
    geometry, features, frames = plan_geometry(32, 32, patch=8), noise(2, 3, 4, 4), coloured(32, 32)
    guided: dict[str, Any] = {"upsampler": "guided"}
    for arguments, options, told in (
        ((noise(2, 3, 4, 5), geometry, (8, 8)), {}, r"\(2, 3, 4, 5\), expected \(T, C, h, w\)"),
        ((features, geometry, "inptu"), {}, r"'input'\) must be .*got 'inptu'"),
        ((features, geometry, (8, 8)), guided | {"frames": frames[:1]}, "1 frames for the .* of 2"),
        ((features, geometry, (8, 8)), guided | {"frames": frames[..., 1:]}, "planned for"),
        ((features, geometry, (8, 8)), guided, "'guided' without frames, expected"),
        ((features, geometry, (8, 8)), {"upsampler": "nearest"}, "got upsampler='nearest'"),
    ):
        with pytest.raises((GeometryError, ValueError), match=told):
            upsample(*arguments, **options)  # type: ignore[arg-type]
