from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.closed_form import Settler
from cosettle_adapter.correspondence import fusion, temporal_fusion
from cosettle_adapter.correspondence.fusion import WINDOW
from cosettle_adapter.errors import TruncatedVideoError

from helpers import write_video

MODES = ("symmetric", "causal")


@pytest.fixture(autouse=True)
def no_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "CUT", 0.0)  # random weights hardly match


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """A photograph of noise that slides."""
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (3, 64, 256), dtype=torch.uint8, generator=generator)
    return torch.stack([photo[..., 16 * t : 16 * t + 96] for t in range(10)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_fused_stream_is_the_fused_clip_in_the_same_chunks(
    tiny_adapter: CoSettleAdapter, clip: Tensor, mode: fusion.FusionMode, batch_size: int
) -> None:
    plain = list(tiny_adapter.stream(clip, batch_size=batch_size, return_backbone=True, fps=10))
    fused = list(
        tiny_adapter.stream(
            clip, batch_size=batch_size, return_backbone=True, fps=10, temporal_fusion=mode
        )
    )
    features = torch.cat([chunk.features for chunk in plain])
    found = torch.cat([chunk.features for chunk in fused])
    guide = torch.cat([tiny_adapter._guide(chunk.backbone) for chunk in plain])  # type: ignore[arg-type]
    assert torch.equal(found, temporal_fusion(features, guide, mode=mode))
    assert not torch.equal(found, features)
    for before, after in zip(plain, fused, strict=True):
        assert (before.start, before.geometry) == (after.start, after.geometry)
        assert torch.equal(before.timestamps, after.timestamps)
        assert before.backbone is not None
        assert after.backbone is not None
        assert torch.equal(before.backbone, after.backbone)
        assert before.features.shape == after.features.shape


def test_a_live_stream_waits_for_the_window_or_for_nothing(
    tiny_adapter: CoSettleAdapter, clip: Tensor
) -> None:
    for mode, waits in (("symmetric", WINDOW), ("causal", 0)):
        seen = 0

        def frames() -> object:
            nonlocal seen
            for frame in clip:
                seen += 1
                yield frame

        # decoding runs a few frames ahead in any case
        ahead = {}
        for fusing in (None, mode):
            seen = 0
            encoded: list[int] = []
            handle = tiny_adapter.projection.register_forward_hook(
                lambda *_, encoded=encoded: encoded.append(1)
            )
            next(tiny_adapter.stream(frames(), batch_size=1, temporal_fusion=fusing))  # type: ignore[arg-type]
            handle.remove()
            ahead[fusing] = len(encoded)
        assert ahead[mode] - ahead[None] == waits


def test_settling_comes_first_and_normalising_last(
    tiny_adapter: CoSettleAdapter, clip: Tensor
) -> None:
    plain = list(tiny_adapter.stream(clip, return_backbone=True))
    guide = torch.cat([tiny_adapter._guide(chunk.backbone) for chunk in plain])  # type: ignore[arg-type]
    settler = Settler(tiny_adapter.width)
    settled = torch.cat([settler.settle(chunk.features) for chunk in plain])
    expected = temporal_fusion(settled, guide)
    expected = torch.nn.functional.normalize(expected, dim=1)
    found = tiny_adapter.stream(clip, settle=True, temporal_fusion="symmetric", normalize=True)
    torch.testing.assert_close(torch.cat([chunk.features for chunk in found]), expected)


def test_frames_that_wait_when_a_video_breaks_off_are_given(
    tiny_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=40, height=48, width=64, noisy=True)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    plain, fused = [], []
    with pytest.raises(TruncatedVideoError):
        plain.extend(tiny_adapter.stream(cut))
    with pytest.raises(TruncatedVideoError):
        fused.extend(tiny_adapter.stream(cut, temporal_fusion="symmetric"))
    assert len(plain) > 1
    assert [len(chunk.features) for chunk in fused] == [len(chunk.features) for chunk in plain]


def test_another_mode_fails_at_the_call(tiny_adapter: CoSettleAdapter, clip: Tensor) -> None:
    with pytest.raises(ValueError, match="'symmetric' or 'causal', got 'past'"):
        tiny_adapter.stream(clip, temporal_fusion="past")  # type: ignore[arg-type]
