from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cosettle_adapter.extraction.formats.flat import FlatStore

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.errors import FrameError
from cosettle_adapter.extraction import extract
from cosettle_adapter.extraction.errors import FormatError, OutputExistsError
from cosettle_adapter.feature_file import read_features
from cosettle_adapter.projection import Projection

from helpers import write_video


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", frames=40, height=48, width=64, fps=20)


def test_a_video_becomes_a_feature_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    result = extract(
        small_adapter, clip, tmp_path / "f.safetensors", max_frames=10, batch_size=4,
        on_chunk=seen.append,
    )  # fmt: skip
    assert (result.frames, result.shape, result.truncated) == (10, (32, 3, 4), None)
    assert seen == [4, 8, 10]
    read = read_features(result.path)
    streamed = torch.cat([c.features for c in small_adapter.stream(clip, max_frames=10)])
    torch.testing.assert_close(read.features, streamed, atol=1e-5, rtol=0)
    torch.testing.assert_close(read.timestamps, torch.arange(10).double() / 20)
    assert read.geometry == small_adapter.geometry(48, 64)
    assert read.metadata["source"] == "clip.mp4"
    assert read.metadata["layers"] == [1]
    assert read.metadata["settings"]["max_frames"] == 10
    assert read.metadata["fingerprint"] == small_adapter.backbone.fingerprint


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("f.safetensors", torch.float16),
        ("f.safetensors", torch.bfloat16),
        ("f.npy", torch.float16),
        ("f.zarr", torch.float16),
    ],
)
def test_storage_dtype(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, name: str, storage: torch.dtype
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    result = extract(small_adapter, clip, tmp_path / name, max_frames=2, storage=storage)
    read = read_features(result.path)
    (streamed,) = small_adapter.stream(clip, max_frames=2)
    assert torch.equal(read.features, streamed.features.to(storage))
    assert read.metadata["dtype"] == "float32"
    assert read.metadata["storage"] == str(storage).removeprefix("torch.")


def test_a_truncated_video_keeps_what_was_readable(
    small_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=120, height=48, width=64, fps=20, noisy=True)
    content = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    result = extract(small_adapter, tmp_path / "cut.mkv", tmp_path / "f.safetensors")
    assert 0 < result.frames < 120
    assert result.truncated is not None
    assert "truncated" in result.truncated
    assert len(read_features(result.path).features) == result.frames


def test_a_full_disk_leaves_no_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cosettle_adapter.extraction.formats.flat.FlatStore.append", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*f\.safetensors'"):
        extract(small_adapter, clip, tmp_path / "f.safetensors", max_frames=3)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_range_without_frames(small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"has no frame from 100\.0 s on"):
        extract(small_adapter, clip, tmp_path / "f.safetensors", start=100.0)
    assert not (tmp_path / "f.safetensors").exists()


def test_no_more_than_a_few_frames_are_alive(
    small_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    produced: list[int] = []
    written = 0
    ahead = 0

    def frames() -> Iterator[torch.Tensor]:
        for index in range(60):
            produced.append(index)
            yield torch.zeros(3, 16, 16, dtype=torch.uint8)

    def on_chunk(count: int) -> None:
        nonlocal written, ahead
        written = count
        ahead = max(ahead, len(produced) - written)

    extract(small_adapter, frames(), tmp_path / "f.safetensors", batch_size=4, on_chunk=on_chunk)
    assert written == 60
    assert ahead <= 5 * 4


def test_encoding_goes_on_while_a_batch_is_written(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write waits until the second batch is encoded, which a single thread never does."""
    second = threading.Event()
    append = FlatStore.append
    waited: list[bool] = []

    def slow(store: FlatStore, features: torch.Tensor) -> None:
        waited.append(second.wait(60))
        append(store, features)

    monkeypatch.setattr(FlatStore, "append", slow)

    def on_chunk(frames: int) -> None:
        if frames == 8:
            second.set()

    destination = tmp_path / "f.safetensors"
    extract(small_adapter, clip, destination, batch_size=4, max_frames=12, on_chunk=on_chunk)
    assert waited == [True] * 3
    streamed = [c.features for c in small_adapter.stream(clip, batch_size=4, max_frames=12)]
    assert torch.equal(read_features(destination).features, torch.cat(streamed))


def test_a_writer_that_fails_is_heard_though_the_source_ends_early(
    small_adapter: CoSettleAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_video(tmp_path / "w.mkv", frames=60, height=48, width=64, fps=20, noisy=True)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    append = FlatStore.append

    def full(store: FlatStore, features: torch.Tensor) -> None:
        if len(features) < 20:
            raise OSError(28, "No space left on device")
        append(store, features)

    monkeypatch.setattr(FlatStore, "append", full)
    with pytest.raises(OSError, match="No space left"):
        extract(small_adapter, cut, tmp_path / "f.safetensors", batch_size=20)
    assert not (tmp_path / "f.safetensors").exists()


def test_a_format_is_told_by_name_or_suffix(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    result = extract(small_adapter, clip, tmp_path / "f", format="npy-memmap", max_frames=2)
    assert read_features(result.path).features.shape == (2, 32, 3, 4)
    for name, format, message in [
        ("f.bin", None, r"f\.bin does not tell its format by its suffix: end it in one of"),
        ("f.npy", "safetensors", r"f\.npy is to be safetensors, but its suffix tells npy-memmap"),
        ("f.npy", "npy", "unknown format 'npy'"),
    ]:
        with pytest.raises(FormatError, match=message):
            extract(small_adapter, clip, tmp_path / name, format=format)
    with pytest.raises(FormatError, match=r"--storage float32 .*bfloat16 goes into safetensors"):
        extract(small_adapter, clip, tmp_path / "f.npy", storage=torch.bfloat16)


def test_features_by_two_recipes_do_not_share_a_folder(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    def by(recipe: int | None) -> CoSettleAdapter:
        config = dataclasses.replace(small_adapter.config, recipe=recipe)
        projection = Projection(config)
        projection.load_state_dict(small_adapter.projection.state_dict())
        return CoSettleAdapter(small_adapter.backbone, projection)

    folder = tmp_path / "features"
    extract(by(1), clip, folder / "a.safetensors", max_frames=2)
    extract(by(1), clip, folder / "b.safetensors", max_frames=3)
    extract(by(None), clip, folder / "own.safetensors", max_frames=2)
    with pytest.raises(OutputExistsError, match=r"holds features by recipe 1 .* pin the one by"):
        extract(by(2), clip, folder / "c.safetensors", max_frames=2)
    extract(by(2), clip, tmp_path / "others" / "c.safetensors", max_frames=2)
