"""Streams of several videos: batches across them, each video's chunks as in a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosettle_adapter import CoSettleAdapter, FeatureChunk, FrameSelection
from cosettle_adapter.correspondence import fusion
from cosettle_adapter.errors import DamagedError, FrameError, GeometryError

from helpers import broken_off, noise, write_video


def clips_of(*counts: int, size: tuple[int, int] = (48, 64)) -> list[Tensor]:
    frames = noise(sum(counts), 3, *size).mul(40).add(128).clamp(0, 255).byte()
    return list(frames.split(counts))


def batches_of(adapter: CoSettleAdapter) -> list[int]:
    """The sizes of the batches that will be encoded."""
    sizes: list[int] = []
    adapter.projection.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    return sizes


def assert_same(found: list[FeatureChunk], alone: list[FeatureChunk]) -> None:
    for many, one in zip(found, alone, strict=True):
        torch.testing.assert_close(many.features, one.features, atol=1e-5, rtol=1e-5)
        assert torch.equal(many.timestamps, one.timestamps)
        assert (many.start, many.lost, many.geometry) == (one.start, one.lost, one.geometry)
        for name in ("backbone", "cls"):
            other, own = getattr(many, name), getattr(one, name)
            assert (other is None) == (own is None)
            if own is not None:
                torch.testing.assert_close(other, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_backbone": True, "normalize": True, "size": (32, 48)},
        {"settle": True, "forgetting": 0.9},
        {"temporal_fusion": "symmetric", "settle": True, "return_backbone": True},
        {"temporal_fusion": "causal", "select": FrameSelection(every=2, source_fps=10)},
        {"return_special": True, "settle": True, "temporal_fusion": "symmetric", "dense": "input",
         "upsampler": "guided"},
    ],
)  # fmt: skip
def test_each_video_is_streamed_as_if_alone(
    tiny_adapter: CoSettleAdapter, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(fusion, "CUT", 0.0)  # random weights hardly match
    clips = clips_of(3, 9, 1, 4)
    found: dict[int, list[FeatureChunk]] = {}
    order = []
    for source, chunk in tiny_adapter.stream_many(iter(clips), batch_size=4, **options):
        order.append(next(number for number, clip in enumerate(clips) if clip is source))
        found.setdefault(order[-1], []).append(chunk)
    assert order == sorted(order)
    for number, clip in enumerate(clips):
        assert_same(found[number], list(tiny_adapter.stream(clip, batch_size=4, **options)))


def test_batches_are_full_across_videos_of_one_size(tiny_adapter: CoSettleAdapter) -> None:
    clips = [*clips_of(3, 2, 3), *clips_of(2, size=(64, 48)), *clips_of(3)]
    sizes = batches_of(tiny_adapter)
    chunks = [chunk for _, chunk in tiny_adapter.stream_many(clips, batch_size=4)]
    assert sizes == [4, 4, 2, 3]
    for chunk in chunks:  # in memory of its own
        assert chunk.features.untyped_storage().nbytes() == chunk.features.nbytes
    sizes.clear()
    chunks = [chunk for _, chunk in tiny_adapter.stream_many(clips, batch_size=4, size=(32, 48))]
    assert sizes == [4, 4, 4, 1]
    assert [chunk.geometry.frame for chunk in chunks] == 3 * [(48, 64)] + [(64, 48), (48, 64)]


@pytest.mark.parametrize("fused", [None, "symmetric"])
def test_a_video_that_fails_takes_no_other_with_it(
    tiny_adapter: CoSettleAdapter, tmp_path: Path, fused: Any
) -> None:
    whole = write_video(tmp_path / "whole.mkv", frames=30, height=48, width=64, noisy=True)
    cut, text = broken_off(whole), tmp_path / "text.mp4"
    text.write_text("no video")
    (small,) = clips_of(2, size=(4, 4))
    sources: list[Any] = [whole, text, cut, small, tmp_path / "nowhere.mp4", whole]
    options: dict[str, Any] = {
        "batch_size": 8,
        "temporal_fusion": fused,
        "select": FrameSelection(on_damage="error"),
    }
    errors: list[tuple[Any, Exception]] = []
    found = list(
        tiny_adapter.stream_many(sources, on_error=lambda *failed: errors.append(failed), **options)
    )
    assert [source for source, _ in errors] == [text, cut, small, tmp_path / "nowhere.mp4"]
    assert [type(error) for _, error in errors] == [
        FrameError, DamagedError, GeometryError, FrameError
    ]  # fmt: skip
    for source, error in errors:
        assert ("the Tensor of frames" if source is small else str(source)) in str(error)
    alone = list(tiny_adapter.stream(whole, **options))
    assert_same([chunk for source, chunk in found if source is whole], [*alone, *alone])
    before_damage = []
    with pytest.raises(DamagedError):
        before_damage.extend(tiny_adapter.stream(cut, **options))
    assert_same([chunk for source, chunk in found if source is cut], before_damage)
    # without on_error, everything before the failure comes first
    delivered = []
    with pytest.raises(FrameError, match=r"text\.mp4 cannot be read"):
        delivered.extend(tiny_adapter.stream_many(sources, **options))
    assert_same([chunk for _, chunk in delivered], alone)


def test_videos_are_read_a_few_batches_ahead(tiny_adapter: CoSettleAdapter) -> None:
    begun: list[int] = []

    def sources() -> Iterator[Tensor]:
        for number, clip in enumerate(clips_of(*[2] * 40)):
            begun.append(number)
            yield clip

    stream = tiny_adapter.stream_many(sources(), batch_size=4)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(begun) <= 2 * 6  # of this batch, of two that wait, and of the next


@pytest.mark.parametrize(
    ("sources", "options", "error", "message"),
    [
        ("clips", {}, TypeError, r"got one path, clips.*find_videos"),
        ([], {"batch_size": 2.5}, ValueError, r"batch_size must be a whole number .*, got 2\.5"),
        ([], {"skip": 3}, TypeError, "got skip, expected size, fit, "),
        ([], {"temporal_fusion": "past"}, ValueError, "'symmetric' or 'causal', got 'past'"),
    ],
)
def test_bad_arguments_fail_at_the_call(
    tiny_adapter: CoSettleAdapter, sources: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_adapter.stream_many(sources, **options)
