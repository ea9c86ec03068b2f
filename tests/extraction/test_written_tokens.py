"""Class tokens, registers and means of frames in feature files; sources whose size changes."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import small_adapter as adapter_of
from PIL import Image
from training_fakes import SMALL_VIT, small_backbone

from cosettle_adapter import CoSettleAdapter, FrameSelection
from cosettle_adapter.correspondence import fusion
from cosettle_adapter.errors import DamagedError, FrameError
from cosettle_adapter.extraction import extract, read_features
from cosettle_adapter.extraction.record import RunRecord
from cosettle_adapter.extraction.settings import ExtractSettings, FormatError, OutputExistsError
from cosettle_adapter.video import open_frames

from helpers import projection_for, write_video

ALL = "mean,registers,cls,patch"
REGISTERS = dataclasses.replace(
    SMALL_VIT, architecture="vit_small_patch16_224", options={**SMALL_VIT.options, "reg_tokens": 3}
)
TEN = FrameSelection(max_frames=10)


@pytest.fixture
def adapter() -> CoSettleAdapter:
    backbone = small_backbone(REGISTERS)
    return CoSettleAdapter(backbone, projection_for(backbone, layers=(0,), out_width=8))


@pytest.mark.parametrize("name", ["f.safetensors", "f.zarr"])
@pytest.mark.parametrize("options", [{}, {"settle": True, "temporal_fusion": "symmetric"}])
def test_a_file_holds_all_kinds_and_says_what_they_are(
    adapter: CoSettleAdapter,
    clip: Path,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    monkeypatch.setattr(fusion, "CUT", 0.0)  # features of random weights
    output = tmp_path / name
    result = extract(adapter, clip, output, select=TEN, batch_size=4, tokens=ALL, **options)
    shapes = {"features": (10, 8, 3, 4), "cls": (10, 32), "registers": (10, 3, 32), "mean": (10, 8)}
    assert (result.arrays, result.shape) == (shapes, (8, 3, 4))
    output.with_name(f"{name}.json").unlink()
    read = read_features(output)
    assert {name: tuple(array.shape) for name, array in read.arrays.items()} == shapes
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    streamed = list(adapter.stream(clip, select=TEN, batch_size=4, **options))
    torch.testing.assert_close(read.features, torch.cat([c.features for c in streamed]), **close)
    torch.testing.assert_close(read.arrays["mean"], read.features.mean((2, 3)), **close)
    tokens = adapter.tokens(torch.cat([chunk.frames for chunk in open_frames(clip, TEN)]))
    torch.testing.assert_close(read.arrays["cls"], tokens.cls, **close)
    torch.testing.assert_close(read.arrays["registers"], tokens.registers, **close)
    said = read.metadata["arrays"]
    told = {name: tuple(array["shape"]) for name, array in said.items()}
    assert told == {**shapes, "timestamps": (10,)}
    assert said["registers"]["axes"] == ["time", "register", "backbone_channel"]
    assert said["cls"]["content"] == "class token of the last layer"
    assert read.metadata["settings"]["tokens"] == ["patch", "cls", "registers", "mean"]
    assert read_features(output, start=3, stop=5).arrays["cls"].equal(read.arrays["cls"][3:5])
    if name.endswith("zarr"):
        opened = pytest.importorskip("xarray").open_zarr(output, consolidated=False)
        assert opened["cls"].dims == ("time", "backbone_channel")
        assert opened["mean"].dims == ("time", "channel")
        assert set(opened["registers"].coords) == {"timestamps"}


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_parquet_has_a_row_for_every_frame(
    adapter: CoSettleAdapter, clip: Path, tmp_path: Path, kind: str, storage: Any
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    select = FrameSelection(start=0.5, every=2, max_frames=10)
    for name in ("f.parquet", "f.npy"):
        extract(adapter, clip, tmp_path / name, select=select, tokens=kind, storage=storage)
    table = parquet.read_table(tmp_path / "f.parquet")
    vectors = np.load(tmp_path / "f.npy")
    assert [str(field.type) for field in table.schema][:3] == ["string", "int64", "double"]
    value = {"float32": "float", "float16": "halffloat"}[storage]
    vector = table.schema.field("vector").type
    assert (str(vector.value_type), vector.list_size) == (value, vectors.shape[1])
    assert table["source"].to_pylist() == ["clip.mp4"] * 10
    assert table["frame"].to_pylist() == list(range(10))
    assert table["time"].to_pylist() == pytest.approx([0.5 + 0.1 * index for index in range(10)])
    assert np.array_equal(np.array(table["vector"].to_pylist(), vectors.dtype), vectors)
    description = json.loads(table.schema.metadata[b"description"])
    assert list(description["arrays"]) == [kind, "timestamps"]
    assert description["geometry"]["frame"] == [48, 64]
    for name in ("f.parquet", "f.npy"):
        read = read_features(tmp_path / name)
        assert torch.equal(read.arrays[kind], torch.from_numpy(vectors))
    with pytest.raises(ValueError, match=rf"clip\.mp4 has no features, but arrays\['{kind}'\]"):
        _ = read.features


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("f.npy", "cls,patch", r"npy-memmap holds one of .*; safetensors and zarr hold any"),
        ("f.parquet", "patch", r"parquet holds one of cls, mean, not patch: give --tokens cls"),
        ("f.parquet", "cls,mean", r"parquet holds one of cls, mean, not cls, mean"),
        ("f.pt", "cls", r"dino-tracker holds one of patch, not cls: give --tokens patch"),
        ("f.npy", "registers", r"small-vit16 has no register tokens: leave registers out of"),
        ("f.npy", "clss", r"expected tokens among patch, cls, registers, mean.*got 'clss'"),
        ("f.npy", "", r"expected tokens among patch, .*, got ''"),
    ],
)
def test_tokens_that_cannot_be_written_are_named(
    small_adapter: CoSettleAdapter, tmp_path: Path, name: str, tokens: str, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(FormatError, match=message):
        extract(small_adapter, "no file", tmp_path / name, tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_a_backbone_without_class_token_has_the_mean(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frames, output = torch.rand(3, 3, 64, 64), tmp_path / "f.parquet"
    with pytest.raises(
        FormatError, match=r"small-convnext has no class token: .* mean gives one vector"
    ):
        extract(adapter_of("convnext"), frames, output, tokens="cls")
    mean = extract(adapter_of("convnext"), frames, output, ExtractSettings(tokens="mean"))
    assert mean.arrays == {"mean": (3, 32)}


def test_a_changed_size_loses_nothing_of_what_precedes_it(
    small_adapter: CoSettleAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, output = tmp_path / "frames", tmp_path / "f.npy"
    folder.mkdir()
    for index in range(16):
        size = (64, 48) if index < 10 else (48, 64)
        Image.new("RGB", size, (10 * index, 0, 0)).save(folder / f"{index}.png")
    changed = r"is 64 x 48, but the first frame is 48 x 64; .*size=.* \(--size\), .*end=10.0 \(--"
    caplog.set_level(logging.WARNING, logger="cosettle_adapter")
    for tokens in ("cls", "patch"):
        for overwrite in (True, False):  # the second run begins behind the change
            options = {"batch_size": 4, "tokens": tokens, "overwrite": overwrite}
            with pytest.raises(FrameError, match=changed):
                extract(small_adapter, folder, output, **options)
    assert "10 frames are kept in" in caplog.text
    assert "with an end (--end) before the unusable frame, it finishes the file" in caplog.text
    with pytest.raises(OutputExistsError, match="end was not given and is 5"):
        extract(small_adapter, folder, output, batch_size=4, select=FrameSelection(end=5.0))
    ended = FrameSelection(end=10.0)
    result = extract(small_adapter, folder, output, batch_size=4, select=ended)
    assert (result.found, result.frames) == (10, 10)
    extract(small_adapter, folder, tmp_path / "whole.npy", batch_size=4, select=ended)
    for suffix in ("", ".json"):
        whole = (tmp_path / f"whole.npy{suffix}").read_bytes()
        assert (tmp_path / f"f.npy{suffix}").read_bytes() == whole
    assert extract(small_adapter, folder, tmp_path / "g.npy", size=(48, 64)).frames == 16


def test_what_precedes_damage_is_kept(
    small_adapter: CoSettleAdapter, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, strict = tmp_path / "f.npy", FrameSelection(on_damage="error")
    for _ in range(2):
        with pytest.raises(DamagedError):
            extract(small_adapter, cut, output, batch_size=4, select=strict)
    ended = FrameSelection(on_damage="error", end=1.95)
    assert extract(small_adapter, cut, output, batch_size=4, select=ended).found == 39

    output = tmp_path / "g.npy"
    with monkeypatch.context() as patched:
        patched.setattr(RunRecord, "finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract(small_adapter, cut, output, batch_size=4)
    result = extract(small_adapter, cut, output, batch_size=4)
    assert result.found == result.frames == 80 - len(result.lost), "no frame follows the damage"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_chosen_times_are_recognised_and_fit_into_the_header(
    small_adapter: CoSettleAdapter, tmp_path: Path
) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=8, height=16, width=32, fps=20)
    times = FrameSelection(times=tuple(index / 1e6 for index in range(2000)))
    output = tmp_path / "f.safetensors"
    result = extract(small_adapter, clip, output, select=times)
    assert extract(small_adapter, clip, output, select=times).found == result.frames
    streamed = torch.cat([c.features for c in small_adapter.stream(clip, select=times)])
    torch.testing.assert_close(read_features(output).features, streamed)
