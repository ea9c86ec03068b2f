"""Streams: the same features as one call, settled and fused on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import reduce
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.closed_form import Settler
from cosettle_adapter.correspondence import FusionMode, fusion, temporal_fusion
from cosettle_adapter.errors import DamagedError, FrameError

from helpers import broken_off, write_video

CLOSE = {"atol": 2e-4, "rtol": 1e-3}
each_mode = pytest.mark.parametrize("mode", ["symmetric", "causal"])


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """A photograph of noise that slides."""
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (3, 64, 256), dtype=torch.uint8, generator=generator)
    return torch.stack([photo[..., 16 * t : 16 * t + 96] for t in range(10)])


@pytest.fixture
def no_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "CUT", 0.0)  # random weights hardly match


def test_streaming_equals_one_call(tiny_adapter: CoSettleAdapter, clip: Tensor) -> None:
    select = FrameSelection(source_fps=10, max_frames=7)
    chunks = list(tiny_adapter.stream(clip, batch_size=3, return_backbone=True, select=select))
    assert [len(chunk.features) for chunk in chunks] == [3, 3, 1]
    assert [chunk.start for chunk in chunks] == [0, 3, 6]
    streamed = torch.cat([chunk.features for chunk in chunks])
    tokens, features = tiny_adapter(clip[:7], return_backbone=True)
    torch.testing.assert_close(streamed, features, atol=1e-5, rtol=0)
    found = torch.cat([chunk.backbone for chunk in chunks])  # type: ignore[misc]
    torch.testing.assert_close(found, tokens, atol=1e-5, rtol=0)
    times = torch.cat([chunk.timestamps for chunk in chunks])
    torch.testing.assert_close(times, torch.arange(7).double() / 10)
    assert chunks[0].geometry == tiny_adapter.geometry(64, 96)
    first = next(tiny_adapter.stream(clip, skip=2, size=(32, 48), normalize=True))
    assert first.backbone is None
    expected = tiny_adapter(clip[2:], size=(32, 48), normalize=True)
    torch.testing.assert_close(first.features, expected, atol=1e-5, rtol=0)


def test_bad_arguments_fail_at_the_call(tiny_adapter: CoSettleAdapter, clip: Tensor) -> None:
    with pytest.raises(FrameError, match=r"nowhere\.mp4 does not exist"):
        tiny_adapter.stream("nowhere.mp4")
    with pytest.raises(ValueError, match="'symmetric' or 'causal', got 'past'"):
        tiny_adapter.stream(clip, temporal_fusion="past")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"forgetting=0, expected"):
        tiny_adapter.stream(clip, settle=True, forgetting=0)


def test_a_stream_settles_by_the_frames_that_came(
    tiny_adapter: CoSettleAdapter, clip: Tensor
) -> None:
    def streamed(source: Tensor, **options: object) -> Tensor:
        chunks = tiny_adapter.stream(source, settle=True, **options)  # type: ignore[arg-type]
        return torch.cat([chunk.features for chunk in chunks])

    found = streamed(clip, batch_size=4)
    torch.testing.assert_close(found, streamed(clip, batch_size=1), **CLOSE)
    torch.testing.assert_close(found[:5], streamed(clip[:5], batch_size=4), **CLOSE)
    plain = tiny_adapter(clip)
    centred = plain[:1] - reduce(plain[:1], "t c h w -> 1 c 1 1", "mean")
    torch.testing.assert_close(found[:1], centred, **CLOSE)
    assert not torch.allclose(found, streamed(clip, forgetting=0.5), atol=1e-3)
    tiny_adapter.settles = True  # unless it is told not to
    for settle, expected in ((None, found), (False, plain)):
        chunks = tiny_adapter.stream(clip, settle=settle)
        streams = torch.cat([chunk.features for chunk in chunks])
        torch.testing.assert_close(streams, expected, **CLOSE)


@each_mode
@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.usefixtures("no_cuts")
def test_a_fused_stream_is_the_fused_clip_in_the_same_chunks(
    tiny_adapter: CoSettleAdapter, clip: Tensor, mode: FusionMode, batch_size: int
) -> None:
    options = {"batch_size": batch_size, "return_backbone": True}
    plain = list(tiny_adapter.stream(clip, **options))  # type: ignore[arg-type]
    fused = list(tiny_adapter.stream(clip, temporal_fusion=mode, **options))  # type: ignore[arg-type]
    features = torch.cat([chunk.features for chunk in plain])
    found = torch.cat([chunk.features for chunk in fused])
    guide = torch.cat([tiny_adapter._guide(chunk.backbone) for chunk in plain])  # type: ignore[arg-type]
    assert torch.equal(found, temporal_fusion(features, guide, mode=mode))
    both = tiny_adapter.stream(clip, settle=True, temporal_fusion=mode, normalize=True, **options)  # type: ignore[arg-type]
    settled = temporal_fusion(Settler(tiny_adapter.width).settle(features), guide, mode=mode)
    expected = torch.nn.functional.normalize(settled, dim=1)
    torch.testing.assert_close(torch.cat([chunk.features for chunk in both]), expected)
    assert not torch.equal(found, features)
    for before, after in zip(plain, fused, strict=True):
        assert (before.start, before.geometry) == (after.start, after.geometry)
        assert torch.equal(before.timestamps, after.timestamps)
        assert before.features.shape == after.features.shape
        assert torch.equal(before.backbone, after.backbone)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_cuts")
@pytest.mark.parametrize(("mode", "waits"), [("symmetric", fusion.WINDOW), ("causal", 0)])
def test_a_live_stream_waits_for_the_window_or_for_nothing(
    tiny_adapter: CoSettleAdapter, clip: Tensor, mode: FusionMode, waits: int
) -> None:
    encoded: list[int] = []
    tiny_adapter.projection.register_forward_hook(lambda *_: encoded.append(1))
    for fusing in (None, mode):
        next(tiny_adapter.stream(iter(clip), batch_size=1, temporal_fusion=fusing))
    assert len(encoded) == 2 + waits


@pytest.mark.usefixtures("no_cuts")
def test_frames_that_wait_when_a_video_breaks_off_are_returned(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=40, height=48, width=64, noisy=True)
    cut = broken_off(whole)
    plain, fused = [], []
    select = FrameSelection(on_damage="error")
    with pytest.raises(DamagedError):
        plain.extend(tiny_adapter.stream(cut, select=select))
    with pytest.raises(DamagedError):
        fused.extend(tiny_adapter.stream(cut, select=select, temporal_fusion="symmetric"))
    warned = list(tiny_adapter.stream(cut, temporal_fusion="symmetric"))
    assert [len(chunk.features) for chunk in warned] == [len(chunk.features) for chunk in plain]
    assert len(warned[-1].lost) == 40 - sum(len(chunk.features) for chunk in plain)
    assert len(plain) > 1
    assert [len(chunk.features) for chunk in fused] == [len(chunk.features) for chunk in plain]
