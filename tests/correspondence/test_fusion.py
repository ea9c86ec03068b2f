from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.backbones import VisionTransformerBackbone
from cosettle_adapter.correspondence import (
    TemporalFusion,
    average_neighbours,
    fusion,
    temporal_fusion,
)
from cosettle_adapter.errors import GeometryError
from cosettle_adapter.starter import starter_photographs
from cosettle_adapter.video import render_clip

MODES = ("symmetric", "causal")


def moving(frames: int = 9, *, seed: int = 0, noise: float = 0.3, step: int = 1) -> Tensor:
    """Random features on 6 x 8 cells that move right, and noise."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(16, 6, 8 + step * frames, generator=generator)
    clip = torch.stack([plane[..., (at := step * (frames - t)) : at + 8] for t in range(frames)])
    return clip + noise * torch.randn(clip.shape, generator=generator)


_RING = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).double()


def _clamped(place: Tensor, height: int, width: int) -> int:
    row, column = place.long().tolist()
    return min(max(row, 0), height - 1) * width + min(max(column, 0), width - 1)


def dense(features: Tensor, guide: Tensor, mode: str, window: int) -> Tensor:
    """The definition, one patch and one neighbour at a time, in float64; no cuts."""
    frames, _, h, _ = features.shape
    cells = rearrange(features.double(), "t c h w -> t (h w) c")
    unit = F.normalize(rearrange(guide.double(), "t c h w -> t (h w) c"), dim=2)
    place = torch.cartesian_prod(torch.arange(h), torch.arange(features.shape[3])).double()
    fused = cells.clone()
    for t in range(frames):
        near = [k for k in range(t - window, t + window + 1) if 0 <= k < frames and k != t]
        near = [k for k in near if mode == "symmetric" or k < t]
        for i in range(cells.shape[1]):
            for k in near:
                cosine, best = (unit[k] @ unit[t, i]).topk(5)
                mean = (cosine / 0.1).softmax(0) @ cells[k, best]
                home = (unit[t] @ unit[k, best[0]]).argmax()
                miss = (place[home] - place[i]).square().sum()
                # patches beyond the edge move as those at the edge
                around = [
                    place[(unit[k] @ unit[t, j]).argmax()] - place[j]
                    for j in (_clamped(place[i] + step, h, features.shape[3]) for step in _RING)
                ]
                median = torch.stack(around).sort(dim=0).values[4]
                apart = (place[best[0]] - place[i] - median).square().sum()
                gate = torch.exp(-miss / 2 - apart / 8)
                fused[t, i] += 0.5 / len(near) * gate * (mean - cells[t, i])
    return rearrange(fused, "t (h w) c -> t c h w", h=h)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("frames", "window", "guided"), [(6, 3, False), (4, 1, True)])
def test_fusion_equals_the_dense_definition(
    mode: fusion.FusionMode, frames: int, window: int, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = moving(frames)
    guide = moving(frames, noise=0.1)[:, :7] if guided else None
    expected = dense(features, features if guide is None else guide, mode, window)
    for band in (fusion._BAND, 20 * 48):  # whole, and in bands of 20 patches
        monkeypatch.setattr(fusion, "_BAND", band)
        fused = temporal_fusion(features, guide, mode=mode, window=window)
        torch.testing.assert_close(fused.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_result_does_not_depend_on_chunks(mode: fusion.FusionMode, chunk: int) -> None:
    features = torch.cat([moving(7), moving(2, seed=1), moving(5, seed=2)])
    fused = TemporalFusion(mode)
    parts = [fused.push(part) for part in features.split(chunk)]
    waited = fused.flush()
    assert len(waited) == (fusion.WINDOW if mode == "symmetric" else 0)
    assert torch.equal(torch.cat([*parts, waited]), temporal_fusion(features, mode=mode))
    again = torch.cat([fused.push(features), fused.flush()])
    assert torch.equal(again, temporal_fusion(features, mode=mode)), "after flush a clip begins"


@pytest.mark.parametrize("mode", MODES)
def test_a_cut_leaves_no_trace(mode: fusion.FusionMode) -> None:
    clips = [moving(5), moving(4, seed=1), moving(1, seed=2), moving(6, seed=3)]
    alone = torch.cat([temporal_fusion(clip, mode=mode) for clip in clips])
    assert torch.equal(temporal_fusion(torch.cat(clips), mode=mode), alone)
    joined = temporal_fusion(moving(9), mode=mode)
    assert not torch.equal(joined[5:], temporal_fusion(moving(9)[5:], mode=mode)), "no cut there"


def test_a_cut_between_rendered_clips_leaves_no_trace(
    real_backbone: VisionTransformerBackbone,
) -> None:
    adapter = CoSettleAdapter.raw(real_backbone, layer=7)
    clips = [
        adapter(render_clip(photo, frames=5, size=(140, 210), motion="pan").frames)
        for photo in list(starter_photographs().values())[:2]
    ]
    alone = [temporal_fusion(clip) for clip in clips]
    assert torch.equal(temporal_fusion(torch.cat(clips)), torch.cat(alone))
    assert all((one - clip).abs().max() > 0.1 for one, clip in zip(alone, clips, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    features = moving(noise=0.1).to(dtype)
    fused = temporal_fusion(features.cuda())
    assert fused.is_cuda
    assert fused.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        fused.cpu().float(), temporal_fusion(features).float(), atol=tolerance, rtol=0
    )


def test_another_grid_begins_a_clip() -> None:
    causal = TemporalFusion("causal")
    causal.push(moving(4))
    assert torch.equal(causal.push(moving(1)[..., :5]), moving(1)[..., :5])
    symmetric = TemporalFusion()
    symmetric.push(moving(4))
    with pytest.raises(GeometryError, match=r"while 2 frames of shape \(16, 6, 8\) .* wait"):
        symmetric.push(moving(4)[..., :5])
    symmetric.flush()
    assert symmetric.push(moving(4)[..., :5]).shape == (2, 16, 6, 5)


@pytest.mark.parametrize("mode", MODES)
def test_what_there_is_little_of(mode: fusion.FusionMode) -> None:
    one = moving(1)
    assert torch.equal(temporal_fusion(one, mode=mode), one)
    assert temporal_fusion(one[:0], mode=mode).shape == (0, 16, 6, 8)
    cell = torch.ones(3, 2, 1, 1)
    assert torch.equal(temporal_fusion(cell, mode=mode), cell)
    flat = torch.ones(4, 3, 5, 6)
    torch.testing.assert_close(temporal_fusion(flat, mode=mode), flat)
    half = moving().bfloat16()  # computed in float32
    fused = temporal_fusion(half.float(), mode=mode)
    assert torch.equal(temporal_fusion(half, mode=mode), fused.bfloat16())


def test_wrong_maps_and_options_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="'symmetric' or 'causal', got 'past'"):
        temporal_fusion(moving(), mode="past")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 1 frame, got 0"):
        TemporalFusion(window=0)
    with pytest.raises(GeometryError, match=r"features of shape \(16, 6, 8\) .* expected"):
        temporal_fusion(moving()[0])
    with pytest.raises(GeometryError, match="int64, expected floating point"):
        temporal_fusion(moving().long())
    with pytest.raises(GeometryError, match=r"guide of shape \(8, 16, 6, 8\) for features"):
        temporal_fusion(moving(), moving(8))


# Averaging within a frame ----------------------------------------------------------------------


def averaged_by_definition(frame: Tensor, share: float) -> Tensor:
    """One patch after the other, as the docstring says."""
    _, height, width = frame.shape
    result = frame.clone()
    for row in range(height):
        for column in range(width):
            near = [
                (y, x)
                for y in range(height)
                for x in range(width)
                if 0 < (y - row) ** 2 + (x - column) ** 2 <= 9
            ]
            others = torch.stack([frame[:, y, x] for y, x in near])
            cosine = F.cosine_similarity(others, frame[None, :, row, column])
            best = cosine.topk(min(5, len(near)))
            mean = torch.softmax(best.values / 0.1, 0) @ others[best.indices]
            result[:, row, column] = (1 - share) * frame[:, row, column] + share * mean
    return result


@pytest.mark.parametrize("grid", [(7, 11), (2, 2), (1, 9), (13, 4)])
def test_it_equals_its_definition_in_every_frame(grid: tuple[int, int]) -> None:
    features = torch.randn(2, 6, *grid)
    found = average_neighbours(features, 0.3)
    torch.testing.assert_close(
        found, torch.stack([averaged_by_definition(frame, 0.3) for frame in features])
    )


def test_a_single_patch_and_no_share_change_nothing_and_the_dtype_is_kept() -> None:
    alone, features = torch.randn(1, 4, 1, 1), torch.randn(1, 8, 6, 6)
    assert torch.equal(average_neighbours(alone, 0.3), alone)
    assert torch.equal(average_neighbours(features, 0.0), features)
    found = average_neighbours(features.bfloat16(), 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), average_neighbours(features, 0.3), rtol=0.1, atol=0.1)
