from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cosettle_adapter.extraction.sidecar import sidecar_path, sidecar_text
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosettle_adapter.errors import CorruptWeightsError
from cosettle_adapter.extraction.formats import FORMATS, Format, Layout, Store, storage_dtype
from cosettle_adapter.feature_file import read_features
from cosettle_adapter.video import plan_geometry

numpy = pytest.importorskip("numpy")

GEOMETRY = plan_geometry(30, 45, patch=15)
OURS = ("safetensors", "zarr", "npy-memmap")


def layout_of(row: Format, channels: int, dtype: torch.dtype, batch: int) -> Layout:
    metadata = {"source": "é", "format": row.name}
    return Layout((channels, 2, 3), dtype, batch, GEOMETRY, metadata)


def written(row: Format, path: Path, batches: list[torch.Tensor], *, sidecar: bool = True) -> Path:
    first = batches[0]
    layout = layout_of(row, first.shape[1], first.dtype, len(first))
    times = torch.arange(sum(map(len, batches))).double() / 24
    with opened(row, path, layout) as store:
        for batch in batches:
            store.append(batch)
        store.finish(times)
    if sidecar:
        sidecar_path(path).write_text(sidecar_text(layout, times.tolist(), truncated=None))
    return path


@contextlib.contextmanager
def opened(row: Format, path: Path, layout: Layout) -> Iterator[Store]:
    store = row.open(path, layout)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture(params=OURS)
def row(request: pytest.FixtureRequest) -> Format:
    if request.param == "zarr":
        pytest.importorskip("zarr")
    return FORMATS[request.param]


@given(
    full=st.integers(0, 3),
    batch=st.integers(1, 6),
    last=st.integers(1, 6),
    channels=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_was_appended_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    full: int,
    batch: int,
    last: int,
    channels: int,
    dtype: torch.dtype,
) -> None:
    sizes = [batch] * full + [min(last, batch)]
    for name in ("safetensors", "npy-memmap"):
        row = FORMATS[name]
        if dtype not in row.dtypes:
            continue
        batches = [torch.randn(size, channels, 2, 3).to(dtype) for size in sizes]
        path = written(row, tmp_path_factory.mktemp("features") / f"clip{row.suffix}", batches)
        read = read_features(path)
        assert torch.equal(read.features, torch.cat(batches))
        assert torch.equal(read.timestamps, torch.arange(sum(sizes)).double() / 24)
        assert read.geometry == GEOMETRY
        assert read.metadata["source"] == "é"


def test_other_readers_open_the_files(tmp_path: Path) -> None:
    batches = [torch.randn(4, 5, 2, 3), torch.randn(3, 5, 2, 3)]
    together = torch.cat(batches)
    file = written(FORMATS["safetensors"], tmp_path / "clip.safetensors", batches)
    assert torch.equal(load_file(file)["features"], together)
    file = written(FORMATS["npy-memmap"], tmp_path / "clip.npy", batches)
    mapped = numpy.load(file, mmap_mode="r")
    assert isinstance(mapped, numpy.memmap)
    assert numpy.array_equal(mapped, together.numpy())
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(
        str(written(FORMATS["zarr"], tmp_path / "clip.zarr", batches)), mode="r"
    )
    assert group["features"].chunks == (4, 5, 2, 3)
    assert numpy.array_equal(group["features"][:], together.numpy())


def test_a_range_of_frames(row: Format, tmp_path: Path) -> None:
    features = torch.randn(9, 5, 2, 3)
    path = written(row, tmp_path / f"clip{row.suffix}", [features[:6], features[6:]])
    read = read_features(path, start=2, stop=7)
    assert torch.equal(read.features, features[2:7])
    assert torch.equal(read.timestamps, torch.arange(2, 7).double() / 24)


def test_a_store_goes_on_where_it_is_told_to(row: Format, tmp_path: Path) -> None:
    first, lost, second, last = torch.randn(4, 4, 5, 2, 3)
    path = tmp_path / f"clip{row.suffix}"
    layout = layout_of(row, 5, torch.float32, 4)
    with opened(row, path, layout) as store:
        store.append(first)
        store.append(lost)
        store.flush()
    with opened(row, path, layout) as store:
        assert torch.equal(store.read(0, 4), first)
        with pytest.raises(ValueError, match="not all there"):
            store.read(8, 12)
        store.keep(4)
        store.append(second)
        store.append(last[:2])
        store.finish(torch.arange(10).double() / 24)
    whole = tmp_path / f"whole{row.suffix}"
    written(row, whole, [first, second, last[:2]], sidecar=False)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    for file in files or [Path()]:
        assert (path / file).read_bytes() == (whole / file).read_bytes()
    assert {p.relative_to(path) for p in path.rglob("*") if p.is_file()} == set(files)


def test_zarr_chunks_are_small_and_divide_a_batch(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    row = FORMATS["zarr"]
    frame = (1 << 20, 2, 3)  # 24 MB: more than a chunk is to hold
    store = row.open(tmp_path / "a.zarr", Layout(frame, torch.float32, 8, GEOMETRY, {}))
    store.close()
    assert zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["features"].chunks == (1, *frame)


def test_what_describes_itself_is_read_without_its_sidecar(row: Format, tmp_path: Path) -> None:
    path = written(row, tmp_path / f"clip{row.suffix}", [torch.randn(4, 5, 2, 3)], sidecar=False)
    if row.describe is None:
        with pytest.raises(CorruptWeightsError, match=r"its sidecar clip\.npy\.json is missing"):
            read_features(path)
    else:
        read = read_features(path)
        assert (read.geometry, read.metadata["source"], len(read.timestamps)) == (GEOMETRY, "é", 4)


def test_a_sidecar_is_plain_json(tmp_path: Path) -> None:
    path = written(FORMATS["npy-memmap"], tmp_path / "clip.npy", [torch.randn(2, 5, 2, 3)])
    said = json.loads(sidecar_path(path).read_text())
    assert (said["shape"], said["source"], said["truncated"]) == ([2, 5, 2, 3], "é", None)
    assert said["timestamps"] == [0.0, 1 / 24]
    assert said["geometry"] == GEOMETRY.to_dict()


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = written(FORMATS["safetensors"], tmp_path / "clip.safetensors", [torch.zeros(1, 2, 2, 3)])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptWeightsError, match=r"clip\.safetensors is truncated or not"):
        read_features(path)
    (tmp_path / "notes.txt").write_text("features")
    with pytest.raises(CorruptWeightsError, match=r"notes\.txt is no feature file: its suffix"):
        read_features(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.npy does not exist"):
        read_features(tmp_path / "none.npy")


@pytest.mark.parametrize("name", OURS)
def test_the_adapters_dtype_is_stored_if_it_can_be(name: str) -> None:
    row = FORMATS[name]
    assert storage_dtype(row, None, torch.float16) == torch.float16
    assert storage_dtype(row, torch.float32, torch.float16) == torch.float32
