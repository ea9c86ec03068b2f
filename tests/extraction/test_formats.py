"""Every format: what is appended is what is read, by us and by others."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosettle_adapter.errors import CorruptFeatureFileError
from cosettle_adapter.extraction import FORMATS, formats, read_features
from cosettle_adapter.extraction.dino_tracker import save_tensor
from cosettle_adapter.extraction.record import RunRecord, sidecar_path
from cosettle_adapter.extraction.settings import FormatName
from cosettle_adapter.video import plan_geometry

ARRAY = {"parquet": "mean"}  # in place of features
GEOMETRY = plan_geometry(30, 45, patch=15)


def written(folder: Path, name: str, batches: list[torch.Tensor], *, sidecar: bool = True) -> Path:
    """A feature file of the batches, with a frame every 24th of a second."""
    if name == "zarr":
        pytest.importorskip("zarr")
    dtype = str(batches[0].dtype).removeprefix("torch.")
    asked = {"source": "é", "source_identity": "sha256:1", "format": name, "storage": dtype}
    asked |= {"settings": {"size": None}}
    path = folder / f"clip{FORMATS[name].suffix}"
    record, times = RunRecord(path, asked), torch.arange(sum(map(len, batches))).double() / 24
    with record.claimed():
        for batch, seconds in zip(batches, times.split([*map(len, batches)]), strict=True):
            record.append({ARRAY.get(name, "features"): batch}, GEOMETRY, seconds)
        record.finish(FORMATS[name].finish)
    if not sidecar:
        sidecar_path(path).unlink()
    return path


@settings(max_examples=60)
@given(
    full=st.integers(0, 3),
    batch=st.integers(1, 6),
    last=st.integers(1, 6),
    channels=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    name=st.sampled_from(["safetensors", "npy-memmap", "dino-tracker"]),
)
def test_what_was_appended_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    full: int,
    batch: int,
    last: int,
    channels: int,
    dtype: str,
    name: str,
) -> None:
    numbers = getattr(torch, dtype if dtype in FORMATS[name].dtypes else "float32")
    sizes = [batch] * full + [min(last, batch)]
    batches = [torch.randn(size, channels, 2, 3).to(numbers) for size in sizes]
    read = read_features(written(tmp_path_factory.mktemp("features"), name, batches))
    assert torch.equal(read.features, torch.cat(batches))
    assert torch.equal(read.timestamps, torch.arange(sum(sizes)).double() / 24)
    assert (read.geometry, read.metadata["source"]) == (GEOMETRY, "é")


@pytest.mark.parametrize("name", FORMATS)
def test_a_range_of_frames_and_what_files_say_of_themselves(name: str, tmp_path: Path) -> None:
    array = ARRAY.get(name, "features")
    features = torch.randn(9, 5, 2, 3) if array == "features" else torch.randn(9, 5)
    path = written(tmp_path, name, [features[:6], features[6:]])
    read = read_features(path, start=2, stop=7)
    assert torch.equal(read.arrays[array], features[2:7])
    assert torch.equal(read.timestamps, torch.arange(2, 7).double() / 24)
    sidecar = json.loads(sidecar_path(path).read_text())
    assert (sidecar["shape"], sidecar["lost"]) == (list(features.shape), [])
    assert sidecar["arrays"][array]["axes"][:2] == ["time", "channel"]
    assert (sidecar["timestamps"][:2], sidecar["geometry"]) == ([0.0, 1 / 24], GEOMETRY.to_dict())
    sidecar_path(path).unlink()
    if name in ("npy-memmap", "dino-tracker"):
        with pytest.raises(CorruptFeatureFileError, match=r"its sidecar clip\..*json is missing"):
            read_features(path)
    else:
        alone = read_features(path, start=2, stop=7)
        assert (alone.geometry, alone.metadata["source"]) == (GEOMETRY, "é")
        assert torch.equal(alone.timestamps, read.timestamps)


def test_other_readers_open_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 500)  # four frames
    batches = [torch.randn(4, 5, 2, 3), torch.randn(3, 5, 2, 3)]
    together = torch.cat(batches)
    assert torch.equal(load_file(written(tmp_path, "safetensors", batches))["features"], together)
    mapped = np.load(written(tmp_path, "npy-memmap", batches), mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, together.numpy())
    group = zarr.open_group(str(written(tmp_path, "zarr", batches)), mode="r")
    assert group["features"].chunks == (4, 5, 2, 3)
    assert np.array_equal(group["features"][:], together.numpy())
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(tmp_path / "clip.zarr", consolidated=False)
    assert opened["features"].dims == ("time", "channel", "row", "column")
    assert list(opened["features"].coords) == ["timestamps"]
    assert opened["features"].isel(time=2).shape == (5, 2, 3)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name in ("safetensors", "npy-memmap", "dino-tracker"):
        path = written(tmp_path, name, [torch.zeros(1, 2, 2, 3)])
        for length in (path.stat().st_size - 4, 100, 0):
            path.write_bytes(path.read_bytes()[:length])
            with pytest.raises(CorruptFeatureFileError, match=rf"{path.name} is truncated or not"):
                read_features(path)
    (tmp_path / "notes.txt").write_text("features")
    with pytest.raises(CorruptFeatureFileError, match=r"notes\.txt is not a feature file: its suf"):
        read_features(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.npy does not exist"):
        read_features(tmp_path / "none.npy")
    assert set(FormatName.__args__) == set(FORMATS), "which the command line offers"


def test_a_tracker_file_is_that_of_torch_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(3, 4, 5, 6)
    (tmp_path / "numbers").write_bytes(b"head" + tensor.numpy().tobytes())
    ours = save_tensor(tmp_path / "numbers", tmp_path / "ours.pt", (3, 4, 5, 6), offset=4)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(tensor, tmp_path / "theirs.pt")
    contents = []
    for path, name in ((ours, "archive"), (tmp_path / "theirs.pt", "theirs")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            entries = ("data.pkl", "data/0", "byteorder", "version")
            contents.append([archive.read(f"{name}/{entry}") for entry in entries])
    assert contents[0] == contents[1]
    assert ours.read_bytes().index(tensor.numpy().tobytes()) % 64 == 0, "aligned"
    for options in ({"weights_only": True}, {"mmap": True}, {"weights_only": False}):
        loaded = torch.load(ours, map_location="cpu", **options)
        assert type(loaded) is torch.Tensor
        assert loaded.is_contiguous()
        assert torch.equal(loaded, tensor)
    if torch.cuda.is_available():
        assert torch.load(ours).device == torch.device("cuda:0")
