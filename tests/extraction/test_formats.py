"""Every format: what is appended is what is read, by us and by others, whatever interrupts."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosettle_adapter.errors import CorruptFeatureFileError, CorruptWeightsError
from cosettle_adapter.extraction import FORMATS, RunRecord, read_features
from cosettle_adapter.extraction.record import sidecar_path
from cosettle_adapter.extraction.settings import FormatName, dtype_name
from cosettle_adapter.extraction.stores import Store
from cosettle_adapter.video import plan_geometry

numpy = pytest.importorskip("numpy")

GEOMETRY = plan_geometry(30, 45, patch=15)


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> type[Store]:
    if request.param == "zarr":
        pytest.importorskip("zarr")
    return FORMATS[request.param]


def record_of(form: type[Store], first: torch.Tensor) -> RunRecord:
    asked = {
        "source": "é",
        "format": form.name,
        "storage": dtype_name(first.dtype),
        "batch_size": len(first),
    }
    return RunRecord(asked, tuple(first.shape[1:]), GEOMETRY)


@contextlib.contextmanager
def opened(form: type[Store], path: Path, record: RunRecord) -> Iterator[Store]:
    store = form(path, record)
    try:
        yield store
    finally:
        store.close()


def written(
    form: type[Store], path: Path, batches: list[torch.Tensor], *, sidecar: bool = True
) -> Path:
    record = record_of(form, batches[0])
    times = torch.arange(sum(map(len, batches))).double() / 24
    with opened(form, path, record) as store:
        for batch in batches:
            store.append(batch)
        store.finish(times)
    if sidecar:
        record.batches.append((0, times.tolist()))
        sidecar_path(path).write_text(record.sidecar(truncated=None))
    return path


def bytes_of(output: Path) -> dict[str, bytes]:
    files = [path for path in output.rglob("*") if path.is_file()] or [output]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@settings(max_examples=60)
@given(
    full=st.integers(0, 3),
    batch=st.integers(1, 6),
    last=st.integers(1, 6),
    channels=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    name=st.sampled_from(["safetensors", "npy-memmap", "dino-tracker"]),
)
def test_what_was_appended_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    full: int,
    batch: int,
    last: int,
    channels: int,
    dtype: torch.dtype,
    name: str,
) -> None:
    form = FORMATS[name]
    dtype = dtype if dtype in form.dtypes else torch.float32
    sizes = [batch] * full + [min(last, batch)]
    batches = [torch.randn(size, channels, 2, 3).to(dtype) for size in sizes]
    path = written(form, tmp_path_factory.mktemp("features") / f"clip{form.suffix}", batches)
    read = read_features(path)
    assert torch.equal(read.features, torch.cat(batches))
    assert torch.equal(read.timestamps, torch.arange(sum(sizes)).double() / 24)
    assert (read.geometry, read.metadata["source"]) == (GEOMETRY, "é")


def test_a_range_of_frames(form: type[Store], tmp_path: Path) -> None:
    features = torch.randn(9, 5, 2, 3)
    path = written(form, tmp_path / f"clip{form.suffix}", [features[:6], features[6:]])
    read = read_features(path, start=2, stop=7)
    assert torch.equal(read.features, features[2:7])
    assert torch.equal(read.timestamps, torch.arange(2, 7).double() / 24)


def test_other_readers_open_the_files(tmp_path: Path) -> None:
    batches = [torch.randn(4, 5, 2, 3), torch.randn(3, 5, 2, 3)]
    together = torch.cat(batches)
    file = written(FORMATS["safetensors"], tmp_path / "clip.safetensors", batches)
    assert torch.equal(load_file(file)["features"], together)
    mapped = numpy.load(written(FORMATS["npy-memmap"], tmp_path / "c.npy", batches), mmap_mode="r")
    assert isinstance(mapped, numpy.memmap)
    assert numpy.array_equal(mapped, together.numpy())
    zarr = pytest.importorskip("zarr")
    file = written(FORMATS["zarr"], tmp_path / "clip.zarr", batches)
    group = zarr.open_group(str(file), mode="r")
    assert group["features"].chunks == (4, 5, 2, 3)
    assert numpy.array_equal(group["features"][:], together.numpy())


def test_a_store_continues_where_it_is_told_to(form: type[Store], tmp_path: Path) -> None:
    first, lost, second, last = torch.randn(4, 4, 5, 2, 3)
    path, record = tmp_path / f"clip{form.suffix}", record_of(form, first)
    with opened(form, path, record) as store:
        store.append(first)
        store.append(lost)
    with opened(form, path, record) as store:
        assert torch.equal(store.read_back(0, 4), first)
        with pytest.raises(ValueError, match="not all there"):
            store.read_back(8, 12)
        store.keep(4)
        store.append(second)
        store.append(last[:2])
        store.finish(torch.arange(10).double() / 24)
    whole = tmp_path / f"whole{form.suffix}"
    written(form, whole, [first, second, last[:2]], sidecar=False)
    assert bytes_of(path) == bytes_of(whole)


def test_zarr_chunks_are_small(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    frame = (1 << 20, 2, 3)  # 24 MB: more than a chunk is to hold
    record = record_of(FORMATS["zarr"], torch.empty(8, *frame, device="meta"))
    FORMATS["zarr"](tmp_path / "a.zarr", record).close()
    assert zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["features"].chunks == (1, *frame)


def test_some_formats_describe_themselves(form: type[Store], tmp_path: Path) -> None:
    path = written(form, tmp_path / f"clip{form.suffix}", [torch.randn(4, 5, 2, 3)], sidecar=False)
    if form.name in ("npy-memmap", "dino-tracker"):
        with pytest.raises(CorruptFeatureFileError, match=r"its sidecar clip\..*json is missing"):
            read_features(path)
    else:
        read = read_features(path)
        assert (read.geometry, read.metadata["source"], len(read.timestamps)) == (GEOMETRY, "é", 4)


def test_a_sidecar_is_plain_json(tmp_path: Path) -> None:
    path = written(FORMATS["npy-memmap"], tmp_path / "clip.npy", [torch.randn(2, 5, 2, 3)])
    said = json.loads(sidecar_path(path).read_text())
    assert (said["shape"], said["source"], said["truncated"]) == ([2, 5, 2, 3], "é", None)
    assert (said["timestamps"], said["geometry"]) == ([0.0, 1 / 24], GEOMETRY.to_dict())


def test_a_damaged_feature_file_is_not_a_damaged_weight_file(tmp_path: Path) -> None:
    path = written(FORMATS["safetensors"], tmp_path / "clip.safetensors", [torch.zeros(1, 2, 2, 3)])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptFeatureFileError, match=r"clip\.safetensors is truncated or not"):
        read_features(path)
    with pytest.raises(CorruptWeightsError):  # for code of version 0.1
        read_features(path)
    (tmp_path / "notes.txt").write_text("features")
    with pytest.raises(CorruptFeatureFileError, match=r"notes\.txt is not a feature file: its suf"):
        read_features(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.npy does not exist"):
        read_features(tmp_path / "none.npy")


def test_every_format_has_a_name() -> None:
    assert set(FormatName.__args__) == set(FORMATS)


def tracker_file(path: Path, tensor: torch.Tensor, *, location: str, piece: int = 2) -> Path:
    form = FORMATS["dino-tracker"]
    with opened(form, path, record_of(form, tensor)) as store:
        store.location = location  # type: ignore[attr-defined]
        for items in tensor.split(piece):
            store.append(items)
        store.finish(torch.zeros(len(tensor)))
    return path


@pytest.mark.parametrize("location", ["cpu", "cuda:0"])
def test_a_tracker_file_is_that_of_torch_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    tensor = torch.randn(3, 4, 5, 6)
    ours = tracker_file(tmp_path / "ours.pt", tensor, location=location)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: location)
    torch.save(tensor, tmp_path / "theirs.pt")
    contents = []
    for path, name in ((ours, "archive"), (tmp_path / "theirs.pt", "theirs")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            entries = ("data.pkl", "data/0", "byteorder", "version")
            contents.append([archive.read(f"{name}/{entry}") for entry in entries])
    assert contents[0] == contents[1]
    again = tracker_file(tmp_path / "again.pt", tensor, location=location, piece=3)
    assert ours.read_bytes() == again.read_bytes()
    assert ours.read_bytes().index(tensor.numpy().tobytes()) % 64 == 0, "aligned"


def test_a_tracker_file_is_loaded_to_the_device_it_names(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 1, 1)
    path = tracker_file(tmp_path / "t.pt", tensor, location="cuda:0")
    seen: list[str] = []

    def note(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        seen.append(location)
        return storage

    torch.load(path, map_location=note)
    assert seen == ["cuda:0"]
    if torch.cuda.is_available():
        assert torch.load(path).device == torch.device("cuda:0")
    cpu = tracker_file(tmp_path / "cpu.pt", tensor, location="cpu")
    for options in ({"weights_only": True}, {"mmap": True}, {"weights_only": False}):
        loaded = torch.load(cpu, **options)
        assert type(loaded) is torch.Tensor
        assert loaded.is_contiguous()
        assert torch.equal(loaded, tensor)
