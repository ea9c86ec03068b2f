"""One source into one file: what is in it, what is refused, what a failure leaves."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.errors import FrameError, MissingExtraError
from cosettle_adapter.extraction import ExtractSettings, extract, read_features
from cosettle_adapter.extraction.record import RunRecord
from cosettle_adapter.extraction.settings import FormatError, OutputExistsError
from cosettle_adapter.projection import Projection

FEW = FrameSelection(max_frames=2)


def test_a_video_becomes_a_feature_file(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    select = FrameSelection(max_frames=10)
    result = extract(
        small_adapter, clip, tmp_path / "f.safetensors", ExtractSettings(batch_size=4),
        select=select, on_chunk=seen.append,
    )  # fmt: skip
    assert (result.frames, result.shape, result.lost) == (10, (32, 3, 4), ())
    assert seen == [4, 8, 10]
    read = read_features(result.path)
    streamed = torch.cat([c.features for c in small_adapter.stream(clip, select=select)])
    torch.testing.assert_close(read.features, streamed, atol=1e-5, rtol=0)
    torch.testing.assert_close(read.timestamps, torch.arange(10).double() / 20)
    assert read.geometry == small_adapter.geometry(48, 64)
    assert (read.metadata["source"], read.metadata["layers"]) == ("clip.mp4", [1])
    assert read.metadata["settings"]["max_frames"] == 10
    assert read.metadata["fingerprint"] == small_adapter.backbone.fingerprint
    settings = ExtractSettings(size=64, batch_size=8)
    small = extract(small_adapter, clip, tmp_path / "f.npy", settings, size=32, select=FEW)
    assert small.shape == (32, 2, 3), "options change settings"
    with pytest.raises(TypeError, match="batchsize"):
        extract(small_adapter, clip, tmp_path / "g.npy", batchsize=2)


@pytest.mark.parametrize(
    ("name", "storage"),
    [("f.safetensors", torch.bfloat16), ("f.npy", torch.float16), ("f.zarr", "float16")],
)
def test_storage_dtype(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, name: str, storage: Any
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    result = extract(small_adapter, clip, tmp_path / name, storage=storage, select=FEW)
    read = read_features(result.path)
    (streamed,) = small_adapter.stream(clip, select=FEW)
    stored = str(storage).removeprefix("torch.")
    assert torch.equal(read.features, streamed.features.to(getattr(torch, stored)))
    assert (read.metadata["dtype"], read.metadata["storage"]) == ("float32", stored)


def test_the_format_is_told_by_name_or_suffix(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    result = extract(small_adapter, clip, tmp_path / "f", format="npy-memmap", select=FEW)
    assert read_features(result.path).features.shape == (2, 32, 3, 4)
    for name, options, message in [
        ("f.bin", {}, r"suffix of f\.bin is not that of a format: use one of"),
        (
            "f.npy",
            {"format": "safetensors"},
            r"format safetensors for f\.npy, .* use the suffix \.safe",
        ),
        ("f.npy", {"format": "npy-memap"}, r"unknown format .*Did you mean 'npy-memmap'"),
        ("f.npy", {"storage": "bfloat16"}, r"--storage float32 .*bfloat16 goes into safetensors"),
    ]:
        with pytest.raises(FormatError, match=message):
            extract(small_adapter, clip, tmp_path / name, **options)
    small_adapter.backbone.to(torch.float16)
    kept = extract(small_adapter, clip, tmp_path / "half.npy", select=FEW)
    assert read_features(kept.path).features.dtype == torch.float16, "the adapter's own"


@pytest.mark.parametrize("broken", [False, True])
def test_a_full_disk_leaves_no_file(
    small_adapter: CoSettleAdapter,
    clip: Path,
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: bool,
) -> None:
    """Also when the last batch fails while the source ends early."""
    append = RunRecord.append

    def full(record: RunRecord, arrays: dict[str, torch.Tensor], *rest: Any) -> None:
        if not broken or len(arrays["features"]) < 20:
            raise OSError(28, "No space left on device")
        append(record, arrays, *rest)

    monkeypatch.setattr(RunRecord, "append", full)
    with pytest.raises(OSError, match=r"No space left on device: .*f\.npy"):
        extract(small_adapter, cut if broken else clip, tmp_path / "f.npy", batch_size=20)
    assert not (tmp_path / "f.npy").exists()
    assert (tmp_path / ".f.npy.partial").exists() == broken, "kept where batches were written"


def test_without_zarr_no_frame_is_read(
    small_adapter: CoSettleAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    frames = iter([torch.zeros(3, 48, 64, dtype=torch.uint8)])
    with pytest.raises(MissingExtraError, match=r"cosettle-adapter\[zarr\]"):
        extract(small_adapter, frames, tmp_path / "f.zarr")
    assert len(list(frames)) == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_leaves_nothing(small_adapter: CoSettleAdapter, tmp_path: Path) -> None:
    output = tmp_path / "f.npy"
    frames = [torch.zeros(3, 48, 64, dtype=torch.uint8)] * 10

    def gone(frames: int) -> None:
        raise OSError("gone")

    with pytest.raises(FrameError, match="the first frame is"):
        extract(small_adapter, [*frames, frames[0][:, :32]], output, batch_size=4)
    with pytest.raises(OSError, match="gone"):
        extract(small_adapter, iter(frames), output, on_chunk=gone)
    with pytest.raises(FrameError, match=r"has no frame from 100\.0 s on"):
        extract(small_adapter, frames, output, select=FrameSelection(start=100.0))
    assert not list(tmp_path.iterdir())


def test_few_frames_are_alive_at_a_time(small_adapter: CoSettleAdapter, tmp_path: Path) -> None:
    produced: list[int] = []
    ahead: list[int] = []

    def frames() -> Iterator[torch.Tensor]:
        for index in range(60):
            produced.append(index)
            yield torch.zeros(3, 16, 16, dtype=torch.uint8)

    def on_chunk(done: int) -> None:
        ahead.append(len(produced) - done)

    extract(small_adapter, frames(), tmp_path / "f.npy", batch_size=4, on_chunk=on_chunk)
    assert len(ahead) == 15
    assert max(ahead) <= 6 * 4


def test_a_batch_is_written_while_the_next_is_encoded(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write waits until the second batch is encoded, which one thread would never do."""
    encoded = threading.Semaphore(0)
    small_adapter.projection.register_forward_hook(lambda *_: encoded.release())
    append, waited = RunRecord.append, []

    def slow(record: RunRecord, *batch: Any) -> None:
        if not waited:
            waited.append(encoded.acquire(timeout=60) and encoded.acquire(timeout=60))
        append(record, *batch)

    monkeypatch.setattr(RunRecord, "append", slow)
    threads = []
    small_adapter.projection.register_forward_hook(lambda *_: threads.append(threading.get_ident()))
    select = FrameSelection(max_frames=12)
    extract(small_adapter, clip, tmp_path / "f.npy", batch_size=4, select=select)
    assert waited == [True]
    assert set(threads) == {threading.get_ident()}, (
        "whose grad mode, device and stream are the caller's"
    )
    streamed = [c.features for c in small_adapter.stream(clip, batch_size=4, select=select)]
    assert torch.equal(read_features(tmp_path / "f.npy").features, torch.cat(streamed))


def test_features_by_two_recipes_do_not_share_a_folder(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    def by(recipe: int | None) -> CoSettleAdapter:
        projection = Projection(dataclasses.replace(small_adapter.config, recipe=recipe))
        projection.load_state_dict(small_adapter.projection.state_dict())
        return CoSettleAdapter(small_adapter.backbone, projection)

    folder = tmp_path / "features"
    for recipe, name in ((1, "a.npy"), (1, "b.npy"), (None, "own.npy")):
        extract(by(recipe), clip, folder / name, select=FEW)
    with pytest.raises(OutputExistsError, match=r"holds features by recipe 1 .* with recipe=1"):
        extract(by(2), clip, folder / "c.npy", select=FEW)
    extract(by(2), clip, tmp_path / "others" / "c.npy", select=FEW)


def test_finished_files_are_left_unless_told_otherwise(
    small_adapter: CoSettleAdapter, clip: Path, tmp_path: Path
) -> None:
    output = tmp_path / "f.safetensors"
    five, six = FrameSelection(max_frames=5), FrameSelection(max_frames=6)
    first = extract(small_adapter, clip, output, select=five)
    assert first.found == 0
    clip = clip.rename(tmp_path / "renamed.mp4")
    again = extract(small_adapter, clip, output, select=five, batch_size=2)
    assert (again.found, again.frames, again.shape) == (5, 5, first.shape)
    with pytest.raises(OutputExistsError, match="max-frames was 5 and is 6"):
        extract(small_adapter, clip, output, select=six)
    with pytest.raises(OutputExistsError, match="exists; start over with --overwrite"):
        extract(small_adapter, [torch.zeros(3, 48, 64, dtype=torch.uint8)], output)
    assert extract(small_adapter, clip, output, select=six, overwrite=True).frames == 6
    output.with_name("f.safetensors.json").unlink()
    with pytest.raises(OutputExistsError, match=r"but not f\.safetensors\.json"):
        extract(small_adapter, clip, output, select=six)


def test_images_are_recognised(small_adapter: CoSettleAdapter, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(40)]
    for index, path in enumerate(paths):
        Image.new("RGB", (64, 48), (index, 0, 0)).save(path)
    output = tmp_path / "f.npy"
    assert extract(small_adapter, paths, output).found == 0
    os.utime(paths[7], ns=(1, 1))
    assert extract(small_adapter, paths, output).found == 40, "it was touched, not changed"
    paths[7].write_bytes(paths[8].read_bytes())
    with pytest.raises(OutputExistsError, match="the source's content has changed"):
        extract(small_adapter, paths, output)
